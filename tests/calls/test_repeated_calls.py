"""A call that is like the one before runs its program at once, and one that is not never does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.calls.program_cache import ProgramCache


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 4), 2.0

    def forward(self, x: Tensor, weights: Tensor, times: int = 1) -> Tensor:
        y = self.linear(x) * self.factor * times + weights
        if self.training:
            y = y * 3
        if x.requires_grad:
            y = y - 1
        return (y * torch.tensor(1 / 3)).double()


def _given(rows: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"x": torch.randn(rows, 4), "weights": torch.randn(rows, 4), "times": 5}


def _factor(model: Model) -> None:
    model.factor = 7.0


def _frozen(model: Model) -> None:
    model.linear.bias.requires_grad_(False)


def _twice(model: Model) -> None:
    model.linear.register_forward_hook(lambda module, given, found: found * 2)


def _default(dtype: torch.dtype) -> AbstractContextManager[Any]:
    context = ExitStack()
    context.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(dtype)
    return context


Change = Callable[[Model], Any]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "rows": _given(3),
    "a constant": _given() | {"times": 6},
    "no constant": {name: value for name, value in _given().items() if name != "times"},
    "dtype": _given() | {"weights": torch.ones(2, 4, dtype=torch.int32)},
    "requires_grad of an input": _given() | {"x": _given()["x"].requires_grad_()},
}
CHANGES: dict[str, Change] = {
    "eval": nn.Module.eval,
    "an attribute": _factor,
    "requires_grad of a parameter": _frozen,
    "a hook": _twice,
}
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype": lambda: _default(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture
def glances(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call, whether it was seen to be like the one before."""
    found: list[bool] = []
    plain: Any = ProgramCache.again

    def again(cache: ProgramCache, *given: Any) -> Any:
        known = plain(cache, *given)
        found.append(known is not None)
        return known

    monkeypatch.setattr(ProgramCache, "again", again)
    return found


def _made() -> tuple[Model, Model, nn.Module]:
    torch.manual_seed(1)
    model = Model()
    return copy.deepcopy(model), model, autopar.parallelize(model, Mesh(), Plan(check_numerics=False))


@pytest.mark.parametrize("name", [*ARGUMENTS, *CHANGES, *SETTINGS])
def test_what_differs_is_seen(name: str, glances: list[bool]) -> None:
    reference, model, parallel = _made()
    given, other = _given(), ARGUMENTS.get(name, _given())
    for _ in range(3):
        assert torch.equal(parallel(**given), reference(**given))
    assert glances == [False, True, True]
    for each in (reference, model, parallel) if name == "eval" else (reference, model):
        CHANGES.get(name, lambda model: None)(each)
    if name == "requires_grad of a parameter":
        _frozen(parallel)  # its parameters are others
    with SETTINGS.get(name, nullcontext)():
        found, expected = parallel(**other), reference(**other)
        assert not glances[-1]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        found.sum().backward(), expected.sum().backward()
    for one, two in zip(parallel.parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.allclose(one.grad.full_tensor(), two.grad, rtol=1e-5)


def test_gradients_and_other_ways_to_pass_the_same(glances: list[bool]) -> None:
    reference, _, parallel = _made()
    given = _given()
    for _ in range(3):
        for module in (parallel, reference):
            module(**given).sum().backward()
    turned = dict(reversed(given.items()))
    assert torch.equal(parallel(**turned), reference(**given)) and torch.equal(
        parallel(*given.values()), reference(**given)
    )
    assert glances == [False, True, True, False, False]
    assert torch.equal(parallel(**given), reference(**given)) and glances[-1]
    for one, two in zip(parallel.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one.grad.full_tensor(), two.grad)
