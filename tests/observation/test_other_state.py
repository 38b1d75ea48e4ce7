"""What forward reads of Python that is no attribute of a module and no item of a container is guarded too."""

from __future__ import annotations

import array
import contextvars
import functools
import os
import sys
import threading
import weakref
from collections import ChainMap, UserDict
from collections.abc import Callable, Iterator
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar
from autopar import Mesh
from autopar.cache.value_digests import Digests
from autopar.frontend.trace import trace
from autopar.ir.guards import Guards
from autopar.module import ParallelModule
from autopar.observation.observation import guards_of_traces

CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("context", default=1.0)
OF_THREAD = threading.local()
OF_THREAD.scale = 1.0
PACKAGE = ModuleType("package")
PACKAGE.settings = ModuleType("package.settings")  # type: ignore[attr-defined]
PACKAGE.settings.scale = 1.0


for made in ("aliased", "imported", "held_module"):
    sys.modules[f"{made}_of_reader"] = ModuleType(f"{made}_of_reader")
    sys.modules[f"{made}_of_reader"].scale = 1.0  # type: ignore[attr-defined]
ALIASED = sys.modules["aliased_of_reader"]
ENTRIES = {"scale": 1.0}
PROXY = MappingProxyType(ENTRIES)


class Subclass(numpy.ndarray):  # type: ignore[type-arg]
    pass


STORED = {
    "an array of objects": numpy.array([1.0, None], dtype=object),
    "an array with a mask": numpy.ma.array([1.0, 2.0]),
    "an array of a subclass": numpy.ones(2).view(Subclass),
    "an array of Python's": array.array("d", [1.0]),
    "a bytearray": bytearray([1]),
    "a chain of dicts": ChainMap({0: 1.0}),
}


class Settings:
    class Model:
        scale = 1.0


class Config:
    scale = 1.0


class Meta(type):
    scale = 1.0

    @property
    def doubled(cls) -> float:
        return 2 * cls.hidden  # type: ignore[attr-defined, no-any-return]


class OfMeta(metaclass=Meta):
    hidden = 0.5


def odd_places() -> float:
    """Reads modules and classes that nobody can watch."""
    from imported_of_reader import scale  # type: ignore[import-not-found]

    here = ALIASED
    return float(here.scale * scale * OfMeta.scale * OfMeta.doubled * PROXY["scale"])


def asked() -> float:
    return float(asked.scale)  # type: ignore[attr-defined]


asked.scale = 1.0  # type: ignore[attr-defined]


class Answering:
    """Gives its attributes itself, from its ``__dict__``."""

    def __init__(self) -> None:
        self.__dict__["kept"] = {"scale": 1.0}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["kept"][name]
        except KeyError:
            raise AttributeError(name) from None


class Linear(nn.Linear):
    """Another class with the same attributes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Held:
    scale = 1.0


BY_NAME = IN_TEXT = OF_MODULE = 1.0
VIEWED, HELD, MEMORY = {"scale": 1.0}, Held(), bytearray([1, 1])


def by_text() -> float:
    found = globals()["BY_NAME"] * globals().get("LATER_OF_READER", 1.0) * eval("IN_TEXT + 0")
    return float(found * vars(sys.modules[__name__])["OF_MODULE"])


class Reader(nn.Module):
    of_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.squash = functools.partial(functional.leaky_relu, negative_slope=0.5)
        self.array = numpy.ones(4)
        self.held = UserDict({"scale": 1.0})
        self.answering = Answering()
        self.config, self.settings = Config, sys.modules["held_module_of_reader"]
        self.view, self.weak, self.memory = VIEWED.values(), weakref.ref(HELD), memoryview(MEMORY)

    @classmethod
    def by_class(cls) -> float:
        return cls.of_class

    def forward(self, x: Tensor) -> Tensor:
        x = functional.softsign(self.squash(self.linear(x) + self.other(x)))
        x = x * float(self.array[1]) * self.held["scale"] * self.answering.scale
        x = x * CONTEXT.get() * OF_THREAD.scale * PACKAGE.settings.scale * Settings.Model.scale * asked()
        x = x * float(os.environ.get("SCALE_OF_READER", "1")) * vars(self).get("late", 1.0) * self.by_class()
        x = x * odd_places() * self.config.scale * getattr(self.settings, "scale")  # noqa: B009
        x = x * by_text() * next(iter(self.view)) * getattr(self.weak(), "scale") * self.memory[1]  # noqa: B009
        for stored in STORED.values():
            x = x * float(stored[0])  # type: ignore[index]
        return (2 * x if os.getenv("READER_IS_DOUBLED") else x).square().mean()


def undone(table: Any, name: str, value: Any) -> tuple[Callable[[Reader], Any], Callable[[Reader], Any]]:
    """Sets an attribute, and takes it back."""
    before = getattr(table, name)
    return lambda model: setattr(table, name, value), lambda model: setattr(table, name, before)


Steps = tuple[Callable[[Reader], Any], Callable[[Reader], Any]]
CHANGES: dict[str, Steps] = {
    "an argument of a partial": (
        lambda m: m.squash.keywords.update(negative_slope=0.9),
        lambda m: m.squash.keywords.update(negative_slope=0.5),
    ),
    "an array": (lambda m: m.array.__setitem__(1, 3.0), lambda m: m.array.__setitem__(1, 1.0)),
    "an object of Python's library": (lambda m: m.held.update(scale=3.0), lambda m: m.held.update(scale=1.0)),
    "an object that answers itself": (
        lambda m: m.answering.kept.update(scale=3.0),
        lambda m: m.answering.kept.update(scale=1.0),
    ),
    "a context variable": (lambda m: CONTEXT.set(3.0), lambda m: CONTEXT.set(1.0)),
    "an attribute of the thread": undone(OF_THREAD, "scale", 3.0),
    "an attribute of a module in a module": undone(PACKAGE.settings, "scale", 3.0),
    "an attribute of a class in a class": undone(Settings.Model, "scale", 3.0),
    "an attribute of a function": undone(asked, "scale", 3.0),
    "an environment variable": (
        lambda m: os.environ.update(SCALE_OF_READER="3"),
        lambda m: os.environ.pop("SCALE_OF_READER"),
    ),
    "one that is asked for": (
        lambda m: os.environ.update(READER_IS_DOUBLED="1"),
        lambda m: os.environ.pop("READER_IS_DOUBLED"),
    ),
    "a name in vars": (lambda m: setattr(m, "late", 3.0), lambda m: delattr(m, "late")),
    "an attribute read through the class": undone(Reader, "of_class", 3.0),
    "a class": (lambda m: setattr(m.linear, "__class__", Linear), lambda m: setattr(m.linear, "__class__", nn.Linear)),
    "a class that is an attribute": undone(Config, "scale", 3.0),
    "a module that is an attribute": undone(sys.modules["held_module_of_reader"], "scale", 3.0),
    "a module under another name": undone(ALIASED, "scale", 3.0),
    "a module that is imported within": undone(sys.modules["imported_of_reader"], "scale", 3.0),
    "an attribute of a metaclass": undone(Meta, "scale", 3.0),
    "what a property of a metaclass reads": undone(OfMeta, "hidden", 3.0),
    "a dict behind a proxy": (lambda m: ENTRIES.update(scale=3.0), lambda m: ENTRIES.update(scale=1.0)),
    "a global by its name": undone(sys.modules[__name__], "BY_NAME", 3.0),
    "a global that comes later": (
        lambda m: globals().update(LATER_OF_READER=3.0),
        lambda m: globals().pop("LATER_OF_READER"),
    ),
    "a global in a text": undone(sys.modules[__name__], "IN_TEXT", 3.0),
    "a global of a module by its name": undone(sys.modules[__name__], "OF_MODULE", 3.0),
    "a dict behind a view": (lambda m: VIEWED.update(scale=3.0), lambda m: VIEWED.update(scale=1.0)),
    "what is held weakly": (lambda m: setattr(HELD, "scale", 3.0), lambda m: delattr(HELD, "scale")),
    "memory that is looked at": (lambda m: MEMORY.__setitem__(1, 3), lambda m: MEMORY.__setitem__(1, 1)),
    "a function of torch's": undone(functional, "softsign", torch.tanh),
}


def _set_first(stored: Any, value: Any, model: Reader) -> None:
    stored[0] = value


for name, one in STORED.items():
    first = one[0]  # type: ignore[index]
    CHANGES[name] = functools.partial(_set_first, one, 3), functools.partial(_set_first, one, first)


@pytest.fixture(scope="module")
def traced() -> tuple[Reader, Guards]:
    model = Reader()
    with guards_of_traces() as guards:
        trace(model, (torch.ones(2, 4),))
    return model, guards


@pytest.mark.parametrize("change, back", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(traced: tuple[Reader, Guards], change: Callable[..., Any], back: Callable[..., Any]) -> None:
    model, guards = traced
    assert guards.hold() and not guards.change()
    change(model)
    try:
        assert not guards.hold() and guards.change()
    finally:
        back(model)
    assert guards.hold(), guards.change()


def test_parameters_that_become_one(traced: tuple[Reader, Guards]) -> None:
    model, guards = traced
    before = model.other.weight
    model.other.weight = model.linear.weight
    assert not guards.hold() and guards.change() == "which parameters are one tensor has changed"
    model.other.weight = nn.Parameter(before.detach().clone())
    assert guards.hold()


@pytest.fixture
def _double() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


class Making(nn.Module):
    """Makes a tensor of the default dtype, and asks how torch is set."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.full((4,), 1 / 3) * (2 if torch.are_deterministic_algorithms_enabled() else 1)
        return (self.linear(x) * made).square().mean()


def test_what_torch_is_set_to(_double: None) -> None:
    torch.manual_seed(0)
    model, x = Making(), torch.randn(2, 4)
    parallel = autopar.parallelize(model, Mesh(dp=2), example_inputs=(x,))

    def loss() -> Tensor | None:
        return parallel.simulate(x).loss

    def expected() -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    torch.testing.assert_close(loss(), expected())
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(loss(), expected())
    torch.set_default_dtype(torch.float64)
    found = loss()
    assert found is not None and found.dtype is expected().dtype is torch.float64
    assert isinstance(parallel, ParallelModule) and len(parallel._programs) == 3


def test_a_kept_program_is_for_the_attributes_of_the_thread() -> None:
    before = Digests(lambda _: None).of(OF_THREAD)
    OF_THREAD.scale = 2.0
    try:
        assert Digests(lambda _: None).of(OF_THREAD) != before
    finally:
        OF_THREAD.scale = 1.0
    assert Digests(lambda _: None).of(OF_THREAD) == before


def test_nothing_is_left_in_the_environment() -> None:
    get = type(os.environ).__getitem__
    trace(Reader(), (torch.ones(2, 4),))
    assert type(os.environ).__getitem__ is get and sys.modules["os"] is os


def test_threads_trace_one_after_the_other() -> None:
    kept = type(os.environ).__getitem__, nn.Module._call_impl, nn.Module.__getattribute__
    failed: list[BaseException] = []

    def work() -> None:
        try:
            trace(Making(), (torch.ones(2, 4),))
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and kept == (type(os.environ).__getitem__, nn.Module._call_impl, nn.Module.__getattribute__)


def test_plain_holders(traced: tuple[Reader, Guards]) -> None:
    """What forward does not read may change."""
    model, guards = traced
    model.unread = SimpleNamespace(scale=1.0)  # type: ignore[assignment]
    del model.unread
    os.environ["NOT_READ_BY_READER"] = "1"
    del os.environ["NOT_READ_BY_READER"]
    assert guards.hold(), guards.change()
