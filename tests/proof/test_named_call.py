"""A program and a call of its model, each by place or by name; and programs of other models than the one asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.proof.named_call import batch_by_name
from autopar.proof.verify import verify

MESH, PLAN = Mesh(dp=2), Plan(check_numerics=False)
COMPUTING = ("field", "float64")
X, Y = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)


class Two(nn.Module):
    """Of two inputs of one shape, which are not to be taken for each other."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8).double(), nn.Linear(8, 8).double() if more else None

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.layer(x) * y.exp()
        h = h if self.other is None else self.other(h)
        return {"loss": h.square().mean(), "h": h}


class WithoutLoss(Two):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"h": self.layer(x) * y.exp()}


class AnyNames(Two):
    def forward(self, x: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        return super().forward(x, **batch)


class ByPlace(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


class Powers(nn.Module):
    """x to the power of 2^31, of which a field of 2^31 - 1 elements knows no more than x^2."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x * x
        return x


def compiled(model: nn.Module, *args: Any, **kwargs: Any) -> AnyProgram:
    return compile_program(model, MESH, PLAN, args, kwargs)


@pytest.mark.parametrize("call", [(X, Y), {"x": X, "y": Y}, {"y": Y, "x": X}], ids=["by place", "by name", "turned"])
def test_a_program_is_called_as_its_model(call: Any) -> None:
    model = Two()
    for program in (compiled(model, X, Y), compiled(model, y=Y, x=X), compiled(model, X, y=Y)):
        found = verify(model, MESH, example_inputs=call, program=program, layers=COMPUTING)
        assert found.proved, str(found)


def test_arguments_of_any_name() -> None:
    assert batch_by_name(AnyNames(), (X,), {"y": Y}).keys() == {"x", "y"}
    assert verify(AnyNames(), MESH, example_inputs={"x": X, "y": Y}, layers=("float64",)).proved
    with pytest.raises(ValueError, match="do not fit the model: .*\nWay out"):
        batch_by_name(Two(), (X, Y, X), {})
    with pytest.raises(ValueError, match="forward takes 'args' by place only"):
        batch_by_name(ByPlace(), (X,), {})


OTHERS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "another parameter": (Two(more=True), (X, Y)),
    "no loss": (WithoutLoss(), (X, Y)),
    "another batch": (Two(), (X.repeat(2, 1), Y.repeat(2, 1))),
    "fewer arguments": (Powers(1), (X,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_program_of_another_model_is_refused(name: str) -> None:
    other, args = OTHERS[name]
    found = verify(Two(), MESH, example_inputs=(X, Y), program=compiled(other, *args), layers=COMPUTING)
    assert {refusal.layer.value for refusal in found.refusals} == set(COMPUTING), str(found)


def test_what_is_not_there_is_not_counted() -> None:
    found = verify(WithoutLoss(), MESH, PLAN, example_inputs=(X, Y), layers=("float64",))
    assert found.proved and list(found.layers[0].facts.values()) == [3], str(found)  # an output and two gradients


def test_what_may_be_equal_by_chance_is_not_proved() -> None:
    found = verify(Powers(31), MESH, example_inputs=(X,), program=compiled(Powers(1), X), layers=("field",))
    assert not found.proved and "may be chance" in found.unproved[0]
