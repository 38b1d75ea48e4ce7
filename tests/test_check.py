"""The laptop check: what it can compare, that it calls right what is right, and finds what is wrong."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar.check
from autopar import Mesh, NumericsError, Plan, TraceError
from autopar.check import Reference, Report, check
from autopar.frontend.trace import trace
from autopar.simulate import simulate
from tests.selection import slow_but

MESHES = (Mesh(dp=2, tp=2), Mesh(pp=2))


def checked(model: nn.Module, mesh: Mesh = MESHES[0], plan: Plan | None = None, **batch: Tensor) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bubble of a small pipeline
        return check(model, batch or {"x": torch.randn(8, 8)}, mesh, plan)


class Mlp(nn.Module):
    """``act`` between two linears; ``ending`` makes the output of what they give."""

    def __init__(self, act: Callable[..., Any] = torch.relu, ending: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act, self.ending = act, ending or (lambda h: {"loss": h.square().mean()})

    def forward(self, x: Tensor) -> Any:
        return self.ending(self.down(self.act(self.up(x))))


# ---------------------------------------------------------------- models that copy.deepcopy does not copy whole


class ThroughFunctions(Mlp):
    """Calls its children through a function, however it is held."""

    def __init__(self, held: str) -> None:
        super().__init__()
        up, down, scale = self.up, self.down, torch.full((8,), 0.5)

        def run(x: Tensor) -> Tensor:
            return down(torch.relu(up(x))) * scale

        self.functions: Any = {
            "attribute": run, "list": [run], "nested": lambda x: run(x), "object": _Holder(run),
        }[held]  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        run = self.functions
        run = run[0] if isinstance(run, list) else run.run if isinstance(run, _Holder) else run
        return {"loss": run(x).square().mean()}


class _Holder:
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run


@pytest.mark.parametrize("held", ["attribute", "list", "nested", "object"])
def test_functions_that_close_over_children(held: str) -> None:
    model = ThroughFunctions(held)
    before = copy.deepcopy(model.state_dict())
    report = checked(model)
    assert report.passed and set(report.grads) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.up.weight.dtype is torch.float32


class WithTensors(Mlp):
    """Has float32 tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.tables = torch.full((8,), 0.5), {"cos": [torch.linspace(0.0, 1.0, 8)]}
        self.cache, self.last = _Cache(torch.eye(8)), torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        h = (self.down(self.up(x).tanh()) * self.scale + self.tables["cos"][0]) @ self.cache.table
        return {"loss": h.square().mean()}


class _Cache:
    def __init__(self, table: Tensor) -> None:
        self.table = table


def test_float32_attributes() -> None:
    model = WithTensors()
    assert checked(model).passed
    assert model.scale.dtype is model.cache.table.dtype is torch.float32


def test_what_a_forward_has_left_behind() -> None:
    model = Mlp()
    model.last = model.up(torch.randn(2, 8))  # part of a graph: deepcopy refuses it
    assert checked(model).passed


def test_a_model_that_cannot_be_copied() -> None:
    model = Mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TraceError, match=r"Mlp cannot be copied: .*lock.*\nWay out: .*__deepcopy__"):
        checked(model)


# ---------------------------------------------------------------- outputs

ENDINGS: dict[str, Callable[[Tensor], Any]] = {
    "logits, loss": lambda h: (h, h.square().mean()),
    "no loss": lambda h: {"logits": h, "pooled": h.mean(1)},
    "one tensor": lambda h: h,
    "two scalars": lambda h: {"a": h.mean(), "b": h.square().sum()},
    "with numbers": lambda h: (h, 3, {"n": torch.arange(3)}),
}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("ending", ENDINGS)
def test_outputs(ending: str, mesh: Mesh) -> None:
    report = checked(Mlp(ending=ENDINGS[ending]), mesh)
    has_loss, on_pipeline = ending == "logits, loss", "pp" in mesh.names
    assert report.passed and report.outputs and (report.loss is not None) == has_loss
    assert bool(report.grads) == (has_loss or not on_pipeline)
    assert not report.step.grads or all(grad.abs().max() > 0 for grad in report.step.grads.values())


# ---------------------------------------------------------------- random numbers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        h = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        return {"loss": self.out(h.transpose(1, 2).flatten(2)).square().mean()}


def with_dropout(h: Tensor) -> Tensor:
    return functional.dropout(torch.relu(h), 0.3)


DRAWING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: Mlp(with_dropout), (8, 8)),
    "attention": (Attention, (4, 6, 8)),
}


@pytest.mark.parametrize("name", slow_but([1], DRAWING))
def test_models_with_dropout(name: str) -> None:
    build, shape = DRAWING[name]
    reference = Reference(build(), {"x": torch.randn(shape)})
    state = torch.get_rng_state()
    plans = [(Mesh(dp=2, tp=2), Plan()), (Mesh(pp=2), Plan(microbatches=2)), (Mesh(dp=2), Plan(zero=3))]
    assert reference.draws and [reference.check(*plan).passed for plan in plans] == [True] * 3
    assert torch.equal(torch.get_rng_state(), state)


class Hooked(Mlp):
    """Makes gradients ten times as large as they are: a hook is not in a traced graph."""

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.up(x))
        if h.requires_grad:
            h.grad_fn.register_prehook(lambda grads: (10.0 * grads[0],))
        return self.ending(self.down(h))


def with_attention(h: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(h, h, h)  # torch marks it as random, whatever it does


@pytest.mark.parametrize("act", [with_dropout, with_attention, torch.relu], ids=lambda act: act.__name__)
def test_dropout_does_not_hide_a_graph_that_is_wrong(act: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 6, 8)
    with pytest.raises(NumericsError, match=r"up\.(weight|bias) differs by"):
        trace(Hooked(act), (x,))
    report = checked(Hooked(act), Mesh(dp=2), x=x)
    assert not report.passed and report.grads["up.weight"] > 0.5


def test_dropout_in_another_order_is_right() -> None:
    """The graph computes each branch where it is used first, the model where it is written."""
    model = Mlp(lambda h: functional.dropout(h, 0.5) + functional.dropout(h.sin(), 0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(model, (torch.randn(8, 8),))


# ---------------------------------------------------------------- gradients that are zero


class Mixer(nn.Module):
    """Biases in front of norms: their gradients are zero but for rounding."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(16, 16, 31, padding=15, groups=16), nn.Conv1d(16, 16, 1)
        self.norm = nn.BatchNorm1d(16) if norm == "batch" else nn.GroupNorm(1, 16, affine=norm == "affine")
        nn.init.normal_(self.first.weight, std=1e-3)

    def forward(self, x: Tensor) -> Any:
        return {"loss": (x + self.last(self.norm(self.first(x)))).tanh().square().mean()}


def mixed(norm: str) -> Reference:
    torch.manual_seed(0)
    return Reference(Mixer(norm), {"x": torch.randn(4, 16, 128)})


def test_gradients_that_are_zero_but_for_rounding() -> None:
    reference = mixed("batch")
    reports = [reference.check(mesh, steps=1) for mesh in (Mesh(dp=2), Mesh(dp=4), Mesh(tp=2))]
    assert all(report.passed for report in reports), [report.worst for report in reports]


@pytest.mark.parametrize("name", ["first.weight", "norm.bias", "last.weight"])
def test_noise_hides_no_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = mixed("batch")
    monkeypatch.setattr(autopar.check, "simulate", changed(name, 1.0 + 1e-8))
    report = reference.check(Mesh(dp=2), steps=1)
    assert not report.passed and max(report.grads, key=lambda key: report.grads[key]) == name


def changed(name: str, factor: float) -> Callable[..., Any]:
    """``simulate``, with one gradient that is a little too large."""

    @functools.wraps(simulate)
    def simulated(*args: Any, **kwargs: Any) -> Any:
        step = simulate(*args, **kwargs)
        return replace(step, grads={**step.grads, name: step.grads[name] * factor})

    return simulated


# ---------------------------------------------------------------- the second step


class LowRank(nn.Module):
    """A LoRA: ``b`` begins at zero (of one number: it gets no noise), so ``a`` has no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return {"loss": (self.base(x) + (x @ self.a).sum(1, keepdim=True) * self.b).square().mean()}


def test_the_second_step_finds_what_zeros_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(LowRank(), {"x": torch.randn(8, 8)})
    assert reference.check(Mesh(dp=2)).passed
    monkeypatch.setattr(autopar.check, "simulate", changed("a", 1.5))
    assert reference.check(Mesh(dp=2), steps=1).passed
    assert not reference.check(Mesh(dp=2)).passed


def test_the_second_step_takes_the_new_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mean = nn.Linear(8, 8), nn.Buffer(torch.zeros(8))

        def forward(self, x: Tensor) -> Any:
            h = self.linear(x)
            loss = (h - self.mean).square().mean()
            self.mean.copy_(0.5 * self.mean + 0.5 * h.detach().mean(0))
            return {"loss": loss}

    reference = Reference(Averaged(), {"x": torch.randn(8, 8)})
    assert reference.check(Mesh(dp=2, tp=2)).passed

    def stale(*args: Any, **kwargs: Any) -> Any:
        return replace(simulate(*args, **kwargs), buffers={})

    monkeypatch.setattr(autopar.check, "simulate", stale)
    assert reference.check(Mesh(dp=2), steps=1).passed and not reference.check(Mesh(dp=2)).passed
