"""Data parallelism: batch dims, gradient reductions, the mean over all tokens, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import sent
from autopar.check import TOLERANCE, check
from autopar.compiler import compile_program, split_program
from autopar.ir import collectives as comm
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.models import transformer
from autopar.plan import Plan
from tests.selection import slow_but


class Contrast(nn.Module):
    """Every row against every row: the batch meets itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        scores = self.norm(self.left(a)) @ self.right(b).t()
        losses = nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction="none")
        return (losses * weights).sum() / weights.sum() + (scores.mean() * scores.std())


@pytest.mark.parametrize("ways", slow_but([1], [2, 3, 4]))
def test_rows_that_meet_other_rows(ways: int) -> None:
    batch = {"a": torch.randn(12, 6), "b": torch.randn(12, 6), "weights": torch.rand(12)}
    report = check(Contrast(), batch, Mesh(dp=ways))
    assert report.worst <= TOLERANCE, report


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return (self.w(x) @ table).square().mean()


def test_inputs_of_another_length_are_not_batched() -> None:
    batch = {"x": torch.randn(4, 3), "table": torch.randn(3, 3)}
    report = check(TwoInputs(), batch, Mesh(dp=2), Plan(batch_dims={"table": None}))
    assert report.worst <= TOLERANCE


def test_inputs_with_several_numbers_of_rows() -> None:
    """10 rows of a model that looks at pairs, and 5 of what it says of each."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.w(x).view(-1, 4) - y).square().mean()

    batch = {"x": torch.randn(10, 3), "y": torch.randn(5, 4)}
    report = check(Pairs(), batch, Mesh(dp=2), Plan(batch_dims={"x": 0, "y": 0}))
    assert report.worst <= TOLERANCE
    assert "f64[6@dp,4]" in str(report.program) and "f64[12@dp,2]" in str(report.program)


def test_ranks_of_ep_have_other_rows_as_those_of_dp() -> None:
    batch = {"x": torch.randn(12, 3), "table": torch.randn(3, 3)}
    plan = Plan(batch_dims={"table": None}, check_numerics=False)

    def split_over(**axes: int) -> Program:
        return split_program(TwoInputs(), Mesh(**axes), plan, (), batch, after="split_batch")

    assert str(split_over(ep=3)) == str(split_over(dp=3)).replace("dp", "ep")
    assert "f32[12@dp@ep,3]" in str(split_over(dp=2, ep=3))
    assert "f32[16@dp@ep,3]" in str(split_over(dp=2, ep=4)) and "f32[12@dp@ep,3]" not in str(split_over(dp=2, ep=4))


def test_an_axis_of_size_one_changes_nothing() -> None:
    batch = {"x": torch.randn(4, 3), "table": torch.randn(3, 3)}
    program = compile_program(TwoInputs(), Mesh(dp=1, tp=1), Plan(batch_dims={"table": None}), (), batch)
    assert "comm." not in str(program)


def test_a_constant_that_counts_rows_here_and_heads_there_stays_apart() -> None:
    """Dropout masks are drawn from positions: 12 rows and 12 heads share a constant, and only rows are split."""
    model = transformer.build(layers=1, heads=12, dropout=0.1)
    program = split_program(model, Mesh(dp=2), Plan(check_numerics=False), (), transformer.example_batch(model, 12))
    assert {transfer.name for transfer in sent(program)} == {"all_reduce"}
    assert not any(value(node).layout.axes for node, _ in program.placeholders(InputKind.PARAMETER))
    calls = [node for node in program.graph.nodes if comm.TARGETS.get(node.target) == "split"]
    assert calls and all(program.input_of(node.args[0]).kind is InputKind.CONSTANT for node in calls)
