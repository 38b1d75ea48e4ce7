"""What forward reads of Python is part of what a program is for; what it would leave behind is refused, and undone."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

import autopar
from autopar import Mesh, Plan
from autopar.errors import AutoparError, TraceError
from autopar.frontend.observation import guards_of_traces
from autopar.frontend.trace import trace
from autopar.module import ParallelModule
from tests.against_one_process import difference

TOLERANCE = 1e-12
STRENGTH = 1.0
SETTINGS = SimpleNamespace(power=2.0)


@dataclass
class Config:
    alpha: float = 1.0
    steps: list[float] = field(default_factory=lambda: [1.0, 2.0])
    inner: dict[str, Any] = field(default_factory=lambda: {"shift": 0.5})


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


def scaled_by(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    """A function that closes over a number, and another one that changes it."""

    def scale(x: Tensor) -> Tensor:
        return x * factor

    def put(other: float) -> None:
        nonlocal factor
        factor = other

    return scale, put


SCALE, PUT_SCALE = scaled_by(1.0)


class Reader(nn.Module):
    """Reads most of what a model can read."""

    bias = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6)
        self.norm, self.act, self.drop = nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.config, self.slotted, self.active = Config(), Slotted(), 3
        self.squash: Callable[[Tensor], Tensor] = torch.tanh
        self.table = torch.linspace(0.0, 1.0, 6)

    @property
    def shift(self) -> float:
        return float(self.config.inner["shift"])

    def helped(self, x: Tensor, offsets: list[float] = [0.0]) -> Tensor:  # noqa: B006
        return x + offsets[0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.down(self.act(self.norm(self.up(x)))))
        for layer in self.layers[: self.active]:
            h = h + self.squash(layer(h))
        h = h * self.config.alpha * sum(self.config.steps) + self.shift + self.bias
        h = self.helped(h) * self.slotted.gain + self.table
        return SCALE(h * STRENGTH).abs().pow(SETTINGS.power).mean()


def put_global(name: str, value: Any) -> Callable[[Reader], None]:
    return lambda model: globals().__setitem__(name, value)


def put(path: str, value: Any) -> Callable[[Reader], None]:
    *owners, name = path.split(".")
    return lambda model: setattr(functools.reduce(getattr, owners, model), name, value)


def call(path: str, *args: Any, **kwargs: Any) -> Callable[[Reader], Any]:
    return lambda model: functools.reduce(getattr, path.split("."), model)(*args, **kwargs)


def patch_forward(model: Reader) -> None:
    model.act.forward = functional.silu  # type: ignore[method-assign,assignment]


def hooked(model: Reader) -> None:
    model.down.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(model: Reader) -> None:
    model.up.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


CHANGES: dict[str, Callable[[Reader], Any]] = {
    "an attribute": put("active", 1),
    "1 to 1.0 of a power": put("active", 2),
    "an attribute that hides the class's": put("bias", 2.0),
    "a config's": put("config.alpha", 3.0),
    "another config": lambda model: setattr(model, "config", Config(alpha=4.0)),
    "a list in place": call("config.steps.append", 3.0),
    "a dict in place": call("config.inner.update", shift=0.75),
    "a slot": put("slotted.gain", 1.5),
    "frozen statistics": call("norm.eval"),
    "momentum": put("norm.momentum", 0.5),
    "epsilon": put("norm.eps", 0.5),
    "another activation": put("act", nn.GELU()),
    "a function": put("squash", torch.sigmoid),
    "a layer less": lambda model: model.layers.__delitem__(0),
    "a layer more": lambda model: model.layers.append(nn.Linear(6, 6)) and put("active", 4)(model),
    "another head": lambda model: setattr(model, "down", nn.Linear(8, 6)),
    "no bias": put("down.bias", None),
    "a hook": hooked,
    "a hook before": hooked_before,
    "another forward": patch_forward,
    "a tensor": lambda model: setattr(model, "table", torch.ones(6)),
    "a tensor written in place": call("table.mul_", 3.0),
}
OUTSIDE: dict[str, tuple[Callable[[Reader], Any], Callable[[Reader], Any]]] = {
    "a global": (put_global("STRENGTH", 2.0), put_global("STRENGTH", 1.0)),
    "an attribute of a global": (lambda m: setattr(SETTINGS, "power", 3.0), lambda m: setattr(SETTINGS, "power", 2.0)),
    "a variable of an enclosing function": (lambda m: PUT_SCALE(2.5), lambda m: PUT_SCALE(1.0)),
    "the class's": (lambda m: setattr(Reader, "bias", 1.25), lambda m: setattr(Reader, "bias", 0.25)),
    "a default argument": (
        lambda m: Reader.helped.__defaults__[0].__setitem__(0, 5.0),  # type: ignore[index]
        lambda m: Reader.helped.__defaults__[0].__setitem__(0, 0.0),  # type: ignore[index]
    ),
}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def reader() -> tuple[ParallelModule, Reader, Tensor]:
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(8, 6)
    return autopar.parallelize(copy.deepcopy(model), Mesh(dp=2), example_inputs=(x,)), model, x


def compare(parallel: ParallelModule, model: nn.Module, x: Tensor) -> None:
    """One simulated step against one of the model: loss, gradients, buffers."""
    step = parallel.simulate(x)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    expected = twin(x)
    expected.backward()
    assert step.loss is not None and difference(step.loss, expected) < TOLERANCE
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            assert difference(step.grads[name], parameter.grad) < 1e-10, name
    for name, buffer in step.buffers.items():
        assert difference(buffer, dict(twin.named_buffers())[name]) < TOLERANCE, name


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_another_program(change: Callable[[Any], Any]) -> None:
    parallel, model, x = reader()
    compare(parallel, model, x)
    for each in (model, parallel):  # which stands for the model
        torch.manual_seed(1)
        change(each)
    compare(parallel, model, x)
    compare(parallel, model, x)
    assert len(parallel._programs) == 2, "what has not changed since is found again"


@pytest.mark.parametrize("change, back", OUTSIDE.values(), ids=OUTSIDE)
def test_a_change_outside_of_the_model(change: Callable[[Any], Any], back: Callable[[Any], Any]) -> None:
    parallel, model, x = reader()
    change(model)
    try:
        compare(parallel, model, x)
    finally:
        back(model)
    compare(parallel, model, x)
    assert len(parallel._programs) == 2, "the first one is found again"


def test_what_forward_does_not_read_makes_none() -> None:
    parallel, model, x = reader()
    parallel.epoch, parallel.history = 3, []
    parallel.history.append(1)
    parallel.config.name, parallel.active = "other", 3
    parallel.config.alpha = 0.5 + 0.5  # an equal value in another object
    assert vars(parallel._held.model)["epoch"] == 3
    compare(parallel, model, x)
    del parallel.epoch
    assert not hasattr(parallel, "epoch") and len(parallel._programs) == 1


@pytest.mark.parametrize("before, now", [(True, 1), (1, 1.0), (0.0, -0.0)])
def test_equal_numbers_that_compute_otherwise(before: Any, now: Any) -> None:
    model = Powered(before)
    with guards_of_traces() as guards:
        trace(model, (torch.ones(2),))
    assert guards.hold()
    model.number = now
    assert not guards.hold() and "number was" in guards.change()


class Powered(nn.Module):
    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


# ---------------------------------------------------------------- what a graph cannot do

CALLS = 0
KEPT: list[Tensor] = []


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps, self.seen = nn.Linear(4, 4), 0, {"calls": 0}
        self.rng, self.noise = random.Random(0), numpy.random.default_rng(0)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.use(x)).square().mean()  # type: ignore[no-any-return]

    def use(self, x: Tensor) -> Tensor:
        return x


class Counts(Base):
    def use(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * min(1.0, self.steps / 4)


class CountsInDict(Base):
    def use(self, x: Tensor) -> Tensor:
        self.seen["calls"] += 1
        return x * self.seen["calls"]


class CountsInGlobal(Base):
    def use(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return x * CALLS


class Remembers(Base):
    def use(self, x: Tensor) -> Tensor:
        KEPT.append(x)
        return x + len(KEPT)


class Moving(Base):
    """Of a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.center = torch.zeros(4)

    def use(self, x: Tensor) -> Tensor:
        self.center = 0.9 * self.center + 0.1 * x.mean(0)
        return x - self.center


class DropsLayers(Base):
    def use(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else self.linear(x)


class DropsLayersByNumpy(Base):
    def use(self, x: Tensor) -> Tensor:
        return x * float(numpy.random.rand())


class HasRandom(Base):
    def use(self, x: Tensor) -> Tensor:
        return x * self.rng.uniform(0, 1)


class HasGenerator(Base):
    def use(self, x: Tensor) -> Tensor:
        return x * float(self.noise.normal())


class Timed(Base):
    def use(self, x: Tensor) -> Tensor:
        return x * (time.time() % 1)


class Differentiates(Base):
    def use(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.linear(x).sum(), x, create_graph=True)[0]


class MovesAPart(Base):
    def use(self, x: Tensor) -> Tensor:
        self.norm.to(torch.float32)
        return x


class Hooked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear.register_full_backward_hook(lambda module, grads, given: (grads[0] * 0.5,))


class Captured(Base):
    def __init__(self) -> None:
        super().__init__()
        found: list[Tensor] = []
        self.linear.register_forward_hook(lambda module, args, output: found.append(output))


@pytest.mark.parametrize(
    "kind, named",
    [
        (Counts, ("'steps'", "self.steps += 1", "add_(1)")),
        (CountsInDict, ("seen",)),
        (CountsInGlobal, ("CALLS (global of", "pass it as an argument")),
        (Remembers, ("KEPT (global of",)),
        (Moving, ("'center'", "self.center = 0.9")),
        (DropsLayers, ("random", "random.random() < 0.5", "a tensor")),
        (DropsLayersByNumpy, ("numpy", "numpy.random.rand()")),
        (HasRandom, ("rng",)),
        (HasGenerator, ("noise",)),
        (Timed, ("the time", "time.time()")),
        (Differentiates, ("differentiates", "torch.autograd.grad(")),
        (MovesAPart, ("moves a part", "self.norm.to(torch.float32)")),
        (Hooked, ("'linear'", "register_full_backward_hook", "remove")),
        (Captured, ("found (variable around", "hook")),
    ],
)
def test_refused_by_name_and_left_as_it_was(kind: type[Base], named: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    globals().update(CALLS=0)
    KEPT.clear()
    model, x = kind(), torch.randn(8, 4)
    before = {key: copy.copy(value) for key, value in vars(model).items()}
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(check_numerics=False))
    with pytest.raises(TraceError) as refusal:
        parallel.simulate(x)
    text = str(refusal.value)
    assert all(word in text for word in named), text
    assert "Way out" in text and text.count("\n") < 15
    assert {key: value for key, value in vars(model).items() if isinstance(value, (int, dict))} == {
        key: value for key, value in before.items() if isinstance(value, (int, dict))
    }
    tensors = [*vars(model).values(), *model.parameters(), *model.buffers()]
    assert CALLS == 0 and not KEPT and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    model(x)


class Caches(Base):
    """Makes a table for the longest input so far, and keeps it; ``form`` says where."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.memo = form, dict[int, Tensor]()
        self.register_buffer("slopes", torch.linspace(0.1, 1.0, 4))
        self.made: Tensor | None = None
        if form == "buffer":
            del self.made
            self.register_buffer("made", None, persistent=False)

    def use(self, x: Tensor) -> Tensor:
        if self.form == "dict":
            if len(x) not in self.memo:
                self.memo[len(x)] = torch.arange(len(x))[:, None] * self.slopes
            return x + self.memo[len(x)]
        if self.made is None or len(self.made) < len(x):
            made = torch.arange(len(x))[:, None] * self.slopes
            if self.form == "buffer":
                self.register_buffer("made", made, persistent=False)
            else:
                self.made = made
        assert self.made is not None
        return x + self.made[: len(x)]


@pytest.mark.parametrize("form", ["attribute", "buffer", "dict"])
def test_a_cache_is_made_before_the_trace(form: str) -> None:
    torch.manual_seed(0)
    model = Caches(form)
    parallel = autopar.parallelize(model, Mesh(dp=2))
    for rows in (4, 8, 4):
        x = torch.randn(rows, 4)
        fresh = Caches(form)
        fresh.load_state_dict(model.state_dict(), strict=False)
        compare(parallel, fresh, x)
    held = [model.made, *model.memo.values()]
    assert model.memo if form == "dict" else model.made is not None
    assert not any(isinstance(tensor, FakeTensor) for tensor in held)


class LeavesLoss(Base):
    """As layers of experts do: the layer leaves its loss in an attribute, from where the model takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.penalty: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.penalty, self.rows = h.square().mean(), len(x)
        return h.mean() + self.penalty


def test_an_attribute_that_forward_sets_before_it_reads_it() -> None:
    torch.manual_seed(0)
    model, x = LeavesLoss(), torch.randn(8, 4)
    parallel = autopar.parallelize(model, Mesh(dp=2), example_inputs=(x,))
    compare(parallel, copy.deepcopy(model), x)
    assert parallel.rows == 8
    compare(parallel, copy.deepcopy(model), x[:4])
    assert parallel.rows == 4
    for use in (
        lambda: parallel.penalty * 2,
        lambda: torch.ones(2) + parallel.penalty,
        lambda: parallel.penalty.item(),
    ):
        with pytest.raises(AutoparError, match="'penalty'.*\n.*return the tensor"):
            use()
    assert len(parallel._programs) == 2
