"""Plans that take the step of each microbatch by itself: what they ask for is proved, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.models import gpt
from autopar.proof.verify import verify
from tests.selection import slow_but

ROWS = Plan(microbatches=3, microbatch_weights="rows", check_numerics=False)


def model_and_batch() -> tuple[nn.Module, dict[str, Any]]:
    """Eight rows, so that the last microbatch is smaller, and unequally many labels."""
    torch.manual_seed(0)
    model = gpt.build(width=8, layers=2, heads=2, vocab=12, context=6)
    batch = gpt.example_batch(model, 8)
    batch["labels"][0, :4] = -100
    return model, batch


@pytest.mark.parametrize("mesh", slow_but([1], [Mesh(), Mesh(pp=2), Mesh(dp=2), Mesh(dp=3)]), ids=str)
def test_the_mean_of_the_losses_of_microbatches(mesh: Mesh) -> None:
    model, batch = model_and_batch()
    found = verify(model, mesh, ROWS, example_inputs=batch, layers=["field"])
    assert found.proved, str(found)


def test_that_of_the_batch_is_refused_for_it() -> None:
    model, batch = model_and_batch()
    program = compile_program(model, Mesh(pp=2), replace(ROWS, microbatch_weights="exact"), (), batch)
    program = replace(program, plan=ROWS)
    found = verify(model, program.mesh, ROWS, example_inputs=batch, layers=["field"], program=program)
    assert any(refusal.where.startswith("output loss") for refusal in found.refusals), str(found)


class Balanced(nn.Module):
    """A loss with a product of two means over the rows, as the balance of a router is one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x))
        return y.square().mean() + (y.mean(0) * y.square().mean(0)).sum()


def test_statistics_of_microbatches_are_not_refused() -> None:
    torch.manual_seed(0)
    plan = Plan(microbatches=2, microbatch_weights="statistics")
    found = verify(Balanced(), Mesh(pp=2), plan, example_inputs={"x": torch.randn(4, 6)})
    assert not found.refusals and not found.proved and "each microbatch" in str(found), str(found)
