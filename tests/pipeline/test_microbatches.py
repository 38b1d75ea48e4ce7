"""The cut of a batch into microbatches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import IndivisibleError, Mesh, Plan, part_of_batch
from autopar.errors import TraceError
from autopar.pipeline import microbatches

PLAN = Plan(microbatches=3, inputs="local")


def test_rows_of_a_rank_are_cut_as_those_of_the_batch() -> None:
    """The program is made for microbatches of the whole batch, and each rank cuts its own rows: the sizes agree."""
    mesh = Mesh(pp=2, dp=2, sp=2)
    batch = {"x": torch.randn(10, 8, 3), "y": torch.zeros(10, 8, dtype=torch.int64), "scale": 2.0}
    whole = microbatches.parts((), batch, mesh, PLAN)
    own = microbatches.parts((), part_of_batch(batch, mesh, PLAN, rank=3), mesh, PLAN, local=True)
    assert [part["x"].shape[0] for part in whole] == [4, 4, 2] and [part["x"].shape[0] for part in own] == [2, 2, 1]
    assert all(part["x"].shape[1] == 4 and part["y"].shape[1] == 4 and part["scale"] == 2.0 for part in own)


def test_too_few_rows() -> None:
    batch = {"x": torch.randn(5, 8)}
    with pytest.raises(IndivisibleError, match="multiple of 6"):
        microbatches.parts((), batch, Mesh(pp=2, dp=2), PLAN)
    assert len(microbatches.parts((), batch, Mesh(pp=2, dp=2), PLAN, local=True)) == 3


class Bags(nn.Module):
    """Rows of an input that are tables, not rows of the batch."""

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        return (x + tables[0] + tables[2]).square().mean()


def test_an_input_that_is_cut_and_has_no_rows() -> None:
    batch = {"x": torch.randn(4, 3), "tables": torch.randn(4, 3)}
    plan = Plan(microbatches=2)
    with pytest.raises(TraceError, match=r"tables \[2, 3\] of \[4, 3\]\n(.|\n)*Plan\(batch_dims=\{'x': 1\}"):
        autopar.compile_program(Bags(), Mesh(pp=1), plan, (), batch)
