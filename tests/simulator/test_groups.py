"""Collectives over merged axes and over parts of one, on ranks in lock-step, against the same on a flat mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.ir import collectives as comm
from autopar.ir.layout import Layout
from autopar.ir.node import Value, set_values
from autopar.ir.traffic import Transfer
from autopar.mesh import Mesh
from autopar.simulator.lockstep import Lockstep

MESH = Mesh(dp=2, sp=4, tp=2)
GROUPS = ("dp+sp", "sp+tp", "dp+tp", "dp+sp+tp", "sp:inner2", "sp:outer2", "dp+sp:inner2", "sp:outer2+tp")


def _arguments(name: str, ways: int) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The arguments after the axis, and the shape of a part."""
    row, length = comm.COLLECTIVES[name], 3 * ways - 1  # does not divide
    if row.form is comm.PART:
        return (ways, 0, 1, [1], length), (3 if row.before == "S" else length, 2)
    if row.form is comm.ENDS:
        return (ways, [0, 1, 1], [1, 1, 1]), (3, 2 * ways)
    if row.form is comm.ORDERS:
        return (ways, [0, 1, 1], [0, -2, 1]), (6, 2)
    if row.form is comm.SIZES:
        return (ways,), (ways, 2)  # and what is sent and received, see _sizes
    return {comm.AXIS: (), comm.REDUCTION: ("sum",), comm.STEPS: (ways, -1)}[row.form], (3, 2)


def _run(name: str, axis: str, mesh: Mesh, parts: list[Tensor]) -> tuple[list[Tensor], tuple[Transfer, ...]]:
    arguments, _ = _arguments(name, mesh.size(axis))
    graph = fx.Graph()
    x = graph.placeholder("x")
    set_values(x, Value(torch.float64, Layout.whole(parts[0].shape)))
    inputs = [list(parts)]
    if comm.COLLECTIVES[name].form is comm.SIZES:
        counts = [graph.placeholder(side) for side in ("send", "receive")]
        inputs += _sizes(axis, mesh)
        arguments = (arguments[0], *counts)
    graph.output((graph.call_function(getattr(comm.OPS, name).default, (x, axis, *arguments)),))
    lockstep = Lockstep(mesh)
    (results,) = lockstep.run(graph, inputs)
    return results, lockstep.traffic


def _sizes(axis: str, mesh: Mesh) -> list[list[Tensor]]:
    """What each rank sends to each other, and receives from it: unequal, some nothing; on each rank ``ways`` rows."""
    ways = mesh.size(axis)
    table = torch.stack([torch.ones(ways, dtype=torch.int64).roll(shift) for shift in range(ways)])
    table[:, 0] += table[:, -1]
    table[:, -1] = 0
    places = [mesh.position(axis, mesh.coordinates(rank)) for rank in range(mesh.world_size)]
    return [[table[place] for place in places], [table[:, place] for place in places]]


@pytest.mark.parametrize("axis", GROUPS)
@pytest.mark.parametrize("name", [name for name, row in comm.COLLECTIVES.items() if row.form is not comm.NOTE])
def test_every_collective_over_a_group_is_that_over_a_flat_axis(name: str, axis: str) -> None:
    ways = MESH.size(axis)
    parts = [torch.randn(_arguments(name, ways)[1], dtype=torch.float64) for _ in range(MESH.world_size)]
    found, traffic = _run(name, axis, MESH, parts)
    for group in MESH.groups(axis):
        expected, flat = _run(name, "tp", Mesh(tp=ways), [parts[rank] for rank in group])
        assert all(torch.equal(found[rank], result) for rank, result in zip(group, expected, strict=True))
        assert [(t.operations, t.bytes) for t in traffic] == [(t.operations, t.bytes) for t in flat], "counted once"
    assert all(transfer.axis == axis for transfer in traffic)


@pytest.mark.parametrize("axis", GROUPS)
def test_the_position_on_a_group(axis: str) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(comm.OPS.axis_index.default, (axis,)),))
    (positions,) = Lockstep(MESH).run(graph, [])
    for group in MESH.groups(axis):
        assert [int(positions[rank]) for rank in group] == list(range(len(group)))


def test_one_reduction_over_two_axes_sends_less_than_two_in_a_row() -> None:
    mesh, size = Mesh(dp=2, sp=4), 16 * 8
    parts = [torch.randn(16, dtype=torch.float64) for _ in range(8)]
    in_one, (once,) = _run("all_reduce", "dp+sp", mesh, parts)
    first, (over_dp,) = _run("all_reduce", "dp", mesh, parts)
    second, (over_sp,) = _run("all_reduce", "sp", mesh, first)
    torch.testing.assert_close(in_one, second, rtol=0, atol=1e-14)
    assert once.bytes == 2 * 7 * size // 8 < over_dp.bytes + over_sp.bytes == size + 2 * 3 * size // 4
