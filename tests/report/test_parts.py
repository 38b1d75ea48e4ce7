"""A drawn rectangle says of each rank which elements it holds: those that the layout cuts out of the tensor."""

from __future__ import annotations

import pytest
import torch

from autopar.ir.layout import Layout, Split, shard
from autopar.ir.node import Value
from autopar.mesh import Mesh
from autopar.report.document import Drawing
from autopar.report.parts import MOST_SEGMENTS, drawing
from tests.selection import slow_but

MESH = Mesh(dp=2, sp=2, tp=3)
Cuts = list[tuple[str, Split]]


def cut(shape: tuple[int, ...], cuts: Cuts) -> Layout:
    layout = Layout.whole(shape)
    for axis, split in cuts:
        layout = layout.place(axis, split, MESH)
    return layout


def elements(drawn: Drawing, rank: int) -> set[int]:
    """The positions in the flat whole tensor that the drawing gives to ``rank``."""
    here = MESH.coordinates(rank)
    marked = torch.ones(drawn.shape, dtype=torch.bool)
    for side in drawn.dims:
        own = torch.zeros(side.size, dtype=torch.bool)
        for segment in side.segments:
            if any(all(here[axis] == at for axis, at in zip(side.axes, owner)) for owner in segment.owners):
                own[segment.start : segment.stop] = True
        shape = [-1 if dim == side.dim else 1 for dim in range(len(drawn.shape))]
        marked &= own.reshape(shape)
    return set(marked.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "shape, cuts",
    slow_but(
        [1, 3, 6],
        [
            ((12, 8), [("tp", Split(0))]),
            ((36, 8), [("tp", Split(0, outer=3)), ("dp", Split(1))]),  # q, k and v in one
            ((24, 8), [("tp", Split(0, ratio=(2, 1, 1))), ("dp+sp", Split(1))]),
            ((7, 5), [("tp", Split(0)), ("dp", Split(1))]),  # uneven: the last part is shorter
            ((8,), [("sp", Split(0, outer=2, mirrored=True))]),
            ((1, 1), [("tp", Split(1))]),  # of a single element only one rank has any
            ((4, 6, 2), [("dp", Split(0)), ("tp", Split(1))]),  # experts
            ((), []),
        ],
    ),
)
def test_each_rank_holds_what_is_drawn(shape: tuple[int, ...], cuts: Cuts) -> None:
    layout = cut(shape, cuts)
    drawn = drawing(Value(torch.float32, layout), MESH)
    numbers = torch.arange(max(1, layout.shape.__len__() and torch.Size(shape).numel())).reshape(shape)
    for rank in range(MESH.world_size):
        assert elements(drawn, rank) == set(shard(numbers, layout, MESH, MESH.coordinates(rank)).flatten().tolist())
    assert drawn.axes == tuple(axis for axis in MESH.names if any(axis in name.split("+") for name, _ in cuts))


def test_more_segments_than_can_be_seen_are_counted() -> None:
    mesh = Mesh(tp=2)
    layout = Layout.whole((400, 4)).place("tp", Split(0, outer=100), mesh)
    (rows, columns) = drawing(Value(torch.float32, layout), mesh).dims
    assert len(rows.segments) == MOST_SEGMENTS and rows.left_out == 200 - MOST_SEGMENTS
    assert columns.axes == () and columns.left_out == 0
