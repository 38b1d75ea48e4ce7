"""Rows that a condition selects: traced with fixed sizes where each is treated alone, else refused with the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, Reference
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.mesh import Mesh
from autopar.plan import Plan

Step = Callable[[nn.Linear, Tensor, Tensor], Tensor]  # layer, rows (4, 3, 4), ids (4, 3)


class Net(nn.Module):
    def __init__(self, step: Step | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.step = nn.Linear(4, 4), step

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        assert self.step is not None
        return self.step(self.layer, x * 1.0, ids).square().sum()


def batch() -> dict[str, Tensor]:
    ids = torch.tensor([[0, 1, 2], [1, 1, 1], [2, 0, 2], [2, 2, 2]])
    return {"x": torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)), "ids": ids}


# ---------------------------------------------------------------- what is taken


def replaced(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    x[ids == 1] = layer(x[ids == 1])
    return x


def replaced_by_a_number(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    mask = ids == 1
    y = layer(x)
    y[mask] = y[mask] * 0.0 + 2.0
    return y


def positions_of_both_dims(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    row, column = (ids > 0).nonzero(as_tuple=True)
    x[row, column] += layer(x[row, column]) * (row + 2 * column).unsqueeze(-1)
    return x


def table_of_positions(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    (place,) = torch.nonzero(ids.flatten() == 2).unbind(1)
    rows = x.reshape(12, 4)
    return rows.index_add(0, place, layer(rows[place]), alpha=0.5)


def list_of_positions(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    place = torch.nonzero(ids.flatten() == 2).squeeze(-1)
    rows = x.reshape(12, 4)
    return rows.index_put((place,), layer(rows[place]))


def along_the_second_dim(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    (place,) = torch.where(ids[0] != 1)
    return x.index_add(1, place, layer(x[:, place]))


def looked_up(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    rows, flat = x.reshape(12, 4), ids.flatten()
    (place,) = torch.where(flat > 0)
    return rows.index_add(0, place, layer(rows[place]) + layer.weight[flat[place]])


def sizes_written(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    rows = x.reshape(12, 4)
    (place,) = torch.where(ids.flatten() > 0)
    chosen = rows[place]
    total = torch.zeros(chosen.shape[0], 2, 2) + layer(chosen).view(chosen.size(0), 2, 2).transpose(1, 2)
    return rows.index_add(0, place, total.reshape(-1, 4))


def nothing_selected(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    return positions_of_both_dims(layer, x, ids - 5)


def put_elsewhere(layer: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    (place,) = torch.where(ids.flatten() == 1)
    return x.reshape(12, 4).index_add(0, 11 - place, layer(x.reshape(12, 4)[place]))


TAKEN: list[Step] = [
    replaced, replaced_by_a_number, positions_of_both_dims, table_of_positions, list_of_positions,
    along_the_second_dim, looked_up, sizes_written, nothing_selected, put_elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("step", TAKEN, ids=lambda step: step.__name__)
def test_rows_that_are_treated_alone(step: Step) -> None:
    reference = Reference(Net(step), batch())
    for mesh in ("dp=1", "dp=2,tp=2"):
        assert reference.check(Mesh.parse(mesh), Plan(zero=3)).worst <= TOLERANCE


def test_one_row() -> None:
    assert (
        Reference(Net(replaced), {"x": torch.randn(1, 1, 4), "ids": torch.ones(1, 1, dtype=torch.int64)})
        .check(Mesh())
        .passed
    )


# ---------------------------------------------------------------- what is refused


class Learned(Net):
    def learned(self, x: Tensor) -> Tensor:
        """Ids that depend on parameters, so that no rank knows beforehand how many there are."""
        return self.layer(x)[..., :3].argmax(-1)


class SoftmaxOfSelected(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        x = x.clone()
        x[ids == 1] = self.layer(x[ids == 1]).softmax(0)
        return x


class Largest(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        return self.layer(x[ids == 1]).max()


class Counted(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        x = x.clone()
        rows = x[ids == 1]
        x[ids == 1] = rows * torch.arange(rows.shape[0]).unsqueeze(-1)
        return self.layer(x)


class Clamped(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        rows = self.layer(x[ids == 1])
        return rows.clamp(max=rows.shape[0]).sum()


class Noise(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        x = x.clone()
        rows = x[ids == 1]
        x[ids == 1] = rows + torch.randn_like(rows)
        return self.layer(x)


class LastOneStays(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        row, column = torch.where(ids == 2)
        out = torch.zeros(4, 4)
        out[row] += self.layer(x[row, column])
        return out


class SelectedTwice(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        rows = x[ids == 1]
        return self.layer(rows[rows[:, 0] > 0]).sum(0)


class OtherRows(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        place = torch.where(ids.flatten() == 1)[0]
        return x.reshape(-1)[:12].index_add(0, place, self.layer(x.reshape(12, 4)[:8][place])[:, 0])


class Returned(Learned):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids = self.learned(x)
        return self.layer(x)[ids == 1]


REFUSED: list[tuple[type[Net], str]] = [
    (Largest, "self.layer(x[ids == 1]).max()"),
    (Clamped, "rows.clamp(max=rows.shape[0])"),
    (SoftmaxOfSelected, "softmax(0)"),
    (Counted, "torch.arange(rows.shape[0])"),
    (Noise, "torch.randn_like(rows)"),
    (LastOneStays, "out[row] +="),
    (SelectedTwice, "rows[rows[:, 0] > 0]"),
    (OtherRows, "[:8][place]"),
    (Returned, "self.layer(x)[ids == 1]"),
]


@pytest.mark.parametrize(("kind", "line"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_refusals_name_the_line(kind: type[Net], line: str) -> None:
    with pytest.raises(TraceError, match="size of a tensor depends on the values in another one") as info:
        trace(kind(), (), batch())
    text = str(info.value)
    assert line in text and "Way out: " in text and text.count("\n") < 15
