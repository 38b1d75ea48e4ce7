"""Batches that the data axes do not divide: copies behind them count nothing, whatever sums, mixes or returns rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.compiler import split_program
from autopar.ir.layout import Factor, Layout, shard
from autopar.ir.node import value
from autopar.mesh import Mesh
from autopar.models import transformer
from autopar.plan import Plan
from autopar.split.padded_batch import places_of

Loss = Callable[[Tensor, Tensor], Tensor]


class Rows(nn.Module):
    """Losses of what a small network makes of the rows of x (n, 6) and of y (n, 6)."""

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        super().__init__()
        self.up, self.down, self.losses = nn.Linear(6, 8), nn.Linear(8, 6), losses

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.down(torch.tanh(self.up(x)))
        found = {name: loss(h, y) for name, loss in self.losses.items()}
        return {"loss": torch.stack([*found.values()]).sum(), **found, "h": h}


def labels(y: Tensor) -> Tensor:
    """A class for each row; that of the first does not count."""
    return torch.where(torch.arange(len(y)) == 0, -100, y.argmax(-1))


def contrast(h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(h, dim=-1) @ F.normalize(y, dim=-1).T, torch.arange(len(h)))


def covariance(h: Tensor, y: Tensor) -> Tensor:
    centred = h - h.mean(0)
    return (centred.T @ centred / (len(h) - 0.5)).square().sum()


SUMS: dict[str, Loss] = {
    "mean": lambda h, y: (h * y).mean(),
    "sum over a size": lambda h, y: (h - y).square().sum() / len(h),
    "labels": lambda h, y: F.cross_entropy(h, labels(y), weight=torch.arange(1.0, 7.0), label_smoothing=0.1),
    "likelihoods": lambda h, y: F.nll_loss(h.log_softmax(-1), labels(y)),
    "chances": lambda h, y: F.cross_entropy(h, y.softmax(-1)),
    "elements": lambda h, y: F.binary_cross_entropy_with_logits(h, y.sigmoid()) + F.smooth_l1_loss(h, y),
    "batchmean": lambda h, y: F.kl_div(h.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "norms": lambda h, y: h.norm() + h.mean(1).exp().prod() + h.logsumexp(0).sum(),
    "largest": lambda h, y: (h - h.detach().amax(0)).square().mean() + (h.detach() > 0.5).any(0).sum() * h.sum(),
    "scatter": lambda h, y: y.new_zeros(6, 6).index_add(0, y.argmax(-1), h).square().sum(),
}
MIXED: dict[str, Loss] = {
    "contrast": contrast,
    "covariance": covariance,
    "deviations": lambda h, y: h.std(0).sum() + h.var(),
    "neighbours": lambda h, y: (h[1:] - h[:-1]).square().sum() + (h.roll(1, 0) * y).sum() + h[-1].sum(),
    "order": lambda h, y: (h.sort(0)[0] * y).mean() + h.median() + (h.cumsum(0) * y).mean(),
    "margins": lambda h, y: F.multi_margin_loss(h, y.argmax(-1)),
    "copies": lambda h, y: (
        (torch.cat([h, y]) ** 2).mean() + (h.repeat_interleave(3, 0).view(-1, 3, 6) * y[:, None]).sum()
    ),
    "noise": lambda h, y: (F.dropout(h, 0.3, True) + torch.randn_like(h) * y).square().mean(),
}


def batch(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    return {"x": torch.randn(rows, 6), "y": torch.randn(rows, 6)}


@pytest.mark.parametrize("losses", [SUMS, MIXED], ids=["sums", "mixed"])
@pytest.mark.parametrize(
    ("rows", "axes"), [(3, {"dp": 2}), (5, {"dp_replicate": 2, "dp_shard": 2})], ids=["dp", "replicas"]
)
def test_copies_count_nothing(losses: Mapping[str, Loss], rows: int, axes: dict[str, int]) -> None:
    report = check(Rows(losses), batch(rows), Mesh(**axes))
    assert report.worst <= TOLERANCE, report


def test_what_sums_rows_is_split() -> None:
    """Each rank does the rows of its part, and no other: of 5 rows on 2 ranks three."""
    sums = {name: loss for name, loss in SUMS.items() if name != "norms"}  # norms of norms: these are gathered
    program = split_program(Rows(sums), Mesh(dp=2), Plan(check_numerics=False), (), batch(5))
    products = [node for node in program.graph.nodes if node.name.startswith("linear")]
    assert {value(node).layout.local_shape(program.mesh)[0] for node in products} == {3}
    assert "comm.all_reduce" in str(program) and "comm.all_gather" not in str(program)


@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7, 9])
@pytest.mark.parametrize("axes", [{"dp": 2}, {"dp": 4}, {"dp": 2, "ep": 3}], ids=["2", "4", "2x3"])
def test_copies_stand_where_an_uneven_split_has_padding(rows: int, axes: dict[str, int]) -> None:
    mesh, whole = Mesh(**axes), torch.arange(rows)
    places, layout = places_of(rows, mesh), Layout(((Factor(rows, tuple(axes)),),))
    assert places.source[places.real].tolist() == whole.tolist() and places.padded % mesh.world_size == 0
    for rank, part in enumerate(zip(places.source.chunk(mesh.world_size), places.real.chunk(mesh.world_size))):
        source, real = part
        own = shard(whole, layout, mesh, mesh.coordinates(rank))
        assert source[real].tolist() == own.tolist() and real.tolist() == sorted(real.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("rows", "axes"),
    [
        (3, {"dp": 4, "tp": 2}),
        (1, {"dp": 2, "tp": 2}),
        pytest.param(7, {"dp_replicate": 2, "dp_shard": 3}, marks=pytest.mark.slow),
        pytest.param(5, {"dp": 2, "sp": 2}, marks=pytest.mark.slow),
    ],
    ids=["dp-tp", "one-row", "replicas", "sp"],
)
def test_a_transformer_with_any_number_of_rows(rows: int, axes: dict[str, int]) -> None:
    """Tokens of rows are one dim at its loss, and their numbers of labels are unequal."""
    model = transformer.build(layers=1, dropout=0.1)
    report = check(model, transformer.example_batch(model, rows), Mesh(**axes), Plan(zero=3))
    assert report.worst <= TOLERANCE, report


def test_outputs_in_parts_are_those_of_an_uneven_split() -> None:
    def returned(rows: int, outputs: str) -> list[str]:
        program = split_program(
            Rows({"mean": SUMS["mean"]}), Mesh(dp=2), Plan(check_numerics=False, outputs=outputs), (), batch(rows)
        )
        return [str(value(node).layout) for node in program.returned]

    assert returned(3, "sharded") == ["[]", "[]", "[3@dp,6]"] and returned(3, "full") == ["[]", "[]", "[3,6]"]
    assert returned(1, "sharded") == ["[]", "[]", "[1,6]"] and returned(4, "sharded") == ["[]", "[]", "[4@dp,6]"]
