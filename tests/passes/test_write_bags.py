"""Embedding tables split by bags, rows and columns, through the whole compiler, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, check
from autopar.compiler import split_program
from autopar.errors import AutoparError
from autopar.ir.layout import Split
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.models import dlrm
from autopar.plan import Plan

aten = torch.ops.aten


class Pools(nn.Module):
    """One look-up of each kind, with weights, padding, sparse gradients and a last offset."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Embedding(12, 6, sparse=True)
        self.padded = nn.EmbeddingBag(12, 6, mode="mean", padding_idx=2)
        self.weighted = nn.EmbeddingBag(12, 6, mode="sum", include_last_offset=True, sparse=True)
        self.scale = nn.Linear(1, 1)

    def forward(self, one: Tensor, several: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        weights = self.scale(weights[:, None])[:, 0]
        y = self.sparse(one) * self.padded(several) * self.weighted(rows, offsets, weights)
        return y.square().mean()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, several, rows = (torch.randint(12, shape, generator=generator) for shape in ((6,), (6, 4), (11,)))
    offsets = torch.tensor([0, 1, 3, 3, 8, 9, 11])
    return {"one": one, "several": several, "rows": rows, "offsets": offsets, "weights": torch.randn(11)}


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "dp=2,tp=3", "tp=6"])
@pytest.mark.parametrize("form", ["row", "column"])
def test_every_kind_of_look_up(form: str, mesh: str) -> None:
    torch.manual_seed(0)
    report = check(Pools(), batch(), Mesh.parse(mesh), Plan(tensor={"scale.*": "replicate", "*": form}))
    assert report.worst <= TOLERANCE
    assert {t.name for t in sent(report.program) if t.axis == "dp"} <= {"all_reduce"}
    assert not any(node.target is aten.embedding_bag.padding_idx for node in report.program.graph.nodes)
    assert str(parse(str(report.program))) == str(report.program)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
def test_bags_are_split_by_batch(ragged: bool, mode: str) -> None:
    model = dlrm.build(ragged=ragged, mode=mode)
    report = check(model, dlrm.example_batch(model), Mesh(dp=3), Plan(check_numerics=False))
    assert report.worst <= TOLERANCE
    assert [(t.phase, t.name, t.operations) for t in sent(report.program)] == [
        ("forward", "all_reduce", 1),
        ("backward", "all_reduce", 1),
    ]


@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
@pytest.mark.parametrize("form", ["row", "vocabulary", "column", "replicate", None])
def test_tables_lie_as_the_plan_says(form: str | None, ragged: bool) -> None:
    model = dlrm.build(ragged=ragged, rows=(97, 245, 144, 60, 48, 36, 24, 13))  # rows that two ranks share unevenly
    plan = Plan(tensor={"tables.*": form} if form else {}, check_numerics=False)
    report = check(model, dlrm.example_batch(model), Mesh(dp=2, tp=2), plan)
    assert report.worst <= TOLERANCE
    tables = [
        value(node).layout.placement("tp", report.program.mesh)
        for node, entry in report.program.placeholders(InputKind.PARAMETER)
        if entry.target.startswith("tables")
    ]
    dims = {placement.dim if isinstance(placement, Split) else None for placement in tables}
    wanted: dict[str | None, Any] = {"row": {0}, "vocabulary": {0}, "column": {1}, "replicate": {None}}
    assert dims == wanted.get(form, dims)
    if form is None:
        assert None not in dims and held(report.program).split["tp"] >= 0.9 * held(report.program).whole


def test_parts_of_ragged_bags_are_refused() -> None:
    model = dlrm.build(ragged=True)
    plan = Plan(inputs="local", check_numerics=False)
    with pytest.raises(AutoparError, match="tables.1 have lengths of their own"):
        split_program(model, Mesh(dp=2), plan, (), dlrm.example_batch(model))
