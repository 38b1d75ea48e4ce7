"""What forward reads of Python is part of what a program is for; what it would leave behind is refused, and undone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar
from autopar import Mesh
from autopar.frontend.trace import trace
from autopar.module import ParallelModule
from autopar.observation.observation import guards_of_traces
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


def compare(parallel: ParallelModule, model: nn.Module, *args: Tensor) -> None:
    """One simulated step against one of the model: loss, gradients, buffers."""
    step = parallel.simulate(*args)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    expected = twin(*args)
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


# ---------------------------------------------------------------- modules under several names


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(4, 4), nn.LayerNorm(4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x))) * (self.scale if self.training else 0.5)


class Repeated(nn.Module):
    """One layer under three names, as in ALBERT: torch traces such a model through stand-ins for its modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = Layer()
        self.first, self.layers, self.power, self.active = layer, nn.ModuleList([layer, layer]), 2.0, 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers[: self.active]:
            x = x + layer(x)
        return x.abs().pow(self.power).mean()


REPEATED: dict[str, Callable[[Any], Any]] = {
    "a number of the model": lambda m: setattr(m, "power", 3.0),
    "a number of the layer": lambda m: setattr(m.first, "scale", 2.0),
    "the layer's mode": lambda m: m.layers[1].eval(),
    "how many layers run": lambda m: setattr(m, "active", 1),
    "another layer": lambda m: m.layers.__setitem__(1, Layer().double()),
    "a hook": lambda m: m.first.register_forward_hook(lambda module, args, out: out * 2),
}


@pytest.mark.parametrize("change", REPEATED.values(), ids=REPEATED)
def test_a_change_in_a_model_whose_layers_are_one(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = Repeated().double(), (torch.randn(6, 4, dtype=torch.float64),)
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2))
    compare(parallel, model, *x)
    torch.manual_seed(1)
    change(model)
    compare(parallel, model, *x)
    assert len(parallel._programs) == 2


class Remembering(nn.Module):
    """Makes a table in its first call, in a layer under two names."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("made", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.made is None:
                self.register_buffer("made", torch.arange(4.0, dtype=torch.float64), persistent=False)
            return x + self.made

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), self.Table()
        self.again = self.table

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.table(self.linear(x))).square().mean()  # type: ignore[no-any-return]


def test_a_table_that_a_layer_under_two_names_makes() -> None:
    torch.manual_seed(0)
    model, x = Remembering().double(), (torch.randn(6, 4, dtype=torch.float64),)
    compare(autopar.parallelize(model, Mesh(dp=2)), model, *x)
    assert type(model.table.made) in (type(None), Tensor)


def test_functions_that_call_each_other_deeper_than_the_stack() -> None:
    """What forward calls is followed through the globals that each function names."""
    names = [f"step_{number}" for number in range(1500)]
    bodies = [f"def {name}(x):\n    return {after}(x)\n" for name, after in zip(names, names[1:])]
    table: dict[str, Any] = {"__name__": "steps_of_a_user"}
    exec("\n".join(["LAST = 1.0", f"def {names[-1]}(x):\n    return x * LAST", *bodies]), table)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = table[names[0]]

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.start else x

    with guards_of_traces() as guards:
        trace(Caller(), (torch.ones(2),))
    assert guards.hold()
    table["LAST"] = 2.0
    assert not guards.hold()
