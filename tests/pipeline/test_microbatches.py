"""The cut of a batch into microbatches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import IndivisibleError, Mesh, Plan, part_of_batch
from autopar.check import check
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


def test_rows_that_do_not_divide() -> None:
    """Microbatches are of two sizes at most; of few rows there are fewer. The data axes divide them where they can."""

    def sizes(rows: int, mesh: Mesh, *, local: bool = False) -> list[int]:
        parts = microbatches.parts((), {"x": torch.randn(rows, 8)}, mesh, PLAN, local=local)
        return [part["x"].shape[0] for part in parts]

    data, both = Mesh(dp=2), Mesh(pp=2, dp=2)
    assert sizes(5, data) == [2, 2, 1] and sizes(11, data) == [4, 4, 3] and sizes(14, data) == [6, 4, 4]
    assert sizes(5, both) == [5] and sizes(9, both) == [3, 3, 3] and sizes(14, both) == [6, 4, 4]
    assert sizes(5, Mesh(pp=2)) == [2, 2, 1] and sizes(4, both) == [2, 2] and sizes(1, both) == [1]
    assert sizes(2, both, local=True) == [1, 1]
    with pytest.raises(IndivisibleError, match="has no rows\nWay out: leave out the call"):
        sizes(0, both)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.down(nn.functional.dropout(torch.tanh(self.up(self.embedding(ids))), 0.1, self.training))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("rows", [5, 6, 9], ids=["one", "two sizes", "equal"])
def test_a_pipeline_beside_data_axes_that_do_not_divide(rows: int) -> None:
    """Rows of microbatches are filled up, with dropout too; those of two sizes have constants of their own."""
    torch.manual_seed(0)
    labels = torch.randint(7, (rows, 3))
    labels[0, :2] = -100
    batch = {"ids": torch.randint(7, (rows, 3)), "labels": labels}
    report = check(Tokens(), batch, Mesh(pp=2, dp=2), Plan(microbatches=3 if rows == 9 else 2))
    assert report.passed, report


class Bags(nn.Module):
    """Rows of an input that are tables, not rows of the batch."""

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        return (x + tables[0] + tables[2]).square().mean()


def test_an_input_that_is_cut_and_has_no_rows() -> None:
    batch = {"x": torch.randn(4, 3), "tables": torch.randn(4, 3)}
    plan = Plan(microbatches=2)
    with pytest.raises(TraceError, match=r"tables \[2, 3\] of \[4, 3\]\n(.|\n)*Plan\(batch_dims=\{'x': 1\}"):
        autopar.compile_program(Bags(), Mesh(pp=1), plan, (), batch)
