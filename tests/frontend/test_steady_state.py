"""What forward would leave on its model for the next call: refused by name, made before the trace, or undone."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import autopar
from autopar import Mesh, Plan
from autopar.check import check
from autopar.errors import AutoparError, TraceError
from tests.observation.test_observation import compare
from tests.selection import one_each


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


class TakesNext(Base):
    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.cycle([0.5, 1.0, 2.0])

    def use(self, x: Tensor) -> Tensor:
        return x * next(self.turns)


def _halved() -> Iterator[float]:
    value = 1.0
    while True:
        yield value
        value /= 2


class TakesNextOfGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.halved = [_halved()]

    def use(self, x: Tensor) -> Tensor:
        return x * next(self.halved[0])


class Timed(Base):
    def use(self, x: Tensor) -> Tensor:
        return x * (time.time() % 1)


class Differentiates(Base):
    def use(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.linear(x).sum(), x, create_graph=True)[0]


class HooksATensor(Base):
    def use(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        h.register_hook(lambda grad: grad * 0.5)
        return h


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
        (TakesNext, ("'turns', an iterator", "outside of the model")),
        (TakesNextOfGenerator, ("'halved', an iterator", "outside of the model")),
        (Timed, ("the time", "time.time()")),
        (Differentiates, ("differentiates", "torch.autograd.grad(")),
        (HooksATensor, ("puts a hook on the gradient", "h.register_hook(")),
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


class Recording(nn.Module):
    """Its first call gives its layer a hook, as ``output_hidden_states`` does in transformers."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.layer, self.once, self.is_ready = nn.Linear(4, 4), once, False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.once and self.is_ready):
            self.layer.register_forward_hook(lambda layer, args, output: output + 1)
            self.is_ready = True
        result: Tensor = self.layer(x)
        return result


def test_hooks_that_forward_installs_once_are_there_once() -> None:
    model, x = Recording(once=True), torch.randn(2, 4)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(autopar.parallelize(model, Mesh())(x), expected)
    assert len(model.layer._forward_hooks) == 1


def test_hooks_that_forward_installs_in_every_call_are_refused() -> None:
    model = Recording(once=False)
    with pytest.raises(TraceError, match="a hook of layer"):
        autopar.parallelize(model, Mesh())(torch.randn(2, 4))
    assert not model.layer._forward_hooks


class Rotary(nn.Module):
    """Makes a table in its first call, beside Python that looks at its inputs (as ESM-2 does)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.length: int | None = None
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        padding: Tensor | None = x.eq(0)
        if not padding.any():  # type: ignore[union-attr]
            padding = None
        if x.shape[1] != self.length:
            self.length, self.table = x.shape[1], torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
        y = self.linear(x) * self.table
        return (y if padding is None else y.masked_fill(padding, 0)).square().mean()


@pytest.mark.parametrize(("number", "mesh"), one_each([1.0, 0.0], [Mesh(dp=2), Mesh(tp=2)]), ids=str)
def test_a_table_is_made_where_python_looks_at_inputs(number: float, mesh: Mesh) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 4, dtype=torch.float64)
    x[0, 0, 0] = number
    assert check(Rotary().double(), {"x": x}, mesh, Plan()).worst < 1e-12


class Grouped(nn.Module):
    """Products of groups of rows, which torch takes in bfloat16 alone where there are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        ends = torch.tensor([3, x[..., 0].numel()], dtype=torch.int32)
        return torch._grouped_mm(x.flatten(0, 1), self.weight, offs=ends).view_as(x)  # type: ignore[no-any-return]


class Packing(nn.Module):
    """torch's encoder, which without gradients packs rows into a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.encoder(x, src_key_padding_mask=mask)
        return found


class Marked(nn.Module):
    """Makes something at its first call, and may look at its inputs: its forward runs on fakes before the trace."""

    def __init__(self, body: nn.Module, looks: bool) -> None:
        super().__init__()
        self.body, self.looks, self.ready = body, looks, False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
        y = self.body(x, mask)
        return (y * 2 if self.looks and mask.any() else y).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("body", "looks"), one_each([Grouped, Packing], [False, True], [(0, 0)]), ids=str)
def test_what_a_trace_takes_runs_on_fakes_too(body: type[nn.Module], looks: bool) -> None:
    torch.manual_seed(0)
    model = Marked(body(), looks).float().eval()
    x, mask = torch.randn(4, 6, 8, dtype=torch.float32), torch.arange(6).expand(4, 6) > 4
    expected = copy.deepcopy(model)(x, mask)
    torch.testing.assert_close(autopar.parallelize(model, Mesh())(x, mask), expected)
