"""Collectives on ranks in lock-step: each operator, and that its registered backward is its dual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import assert_close as close

from autopar.autodiff.differentiate import role_of
from autopar.ir import collectives as comm
from autopar.ir.layout import Layout, Split, owned_indices
from autopar.ir.node import Value, set_values
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.ir.traffic import moved_bytes
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.simulator.lockstep import Lockstep, collective

SPLITS = {
    "even": (Split(0), 12),
    "second dim": (Split(1), 12),
    "uneven": (Split(0), 7),
    "fewer than ranks": (Split(1), 2),
    "blocks": (Split(0, outer=2), 24),
    "ratio": (Split(1, ratio=(2, 1)), 36),
    "mirrored": (Split(0, outer=2, mirrored=True), 24),
}
WAYS = (1, 2, 3, 4)
# those whose result is as their row says for whatever they are given; the others: test_groups, routing/test_placement
LYING = [name for name, row in comm.COLLECTIVES.items() if row.form not in (comm.SIZES, comm.NOTE)]
STEPS = dict(zip(SPLITS, (1, -1, 2, -5, 4, 0, 3)))  # of a shift


def _shape(split: Split, length: int) -> list[int]:
    return [length if dim == split.dim else 5 for dim in range(2)]


def _program(target: Any, arguments: tuple[Any, ...], mesh: Mesh, example: Tensor) -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    set_values(x, Value(torch.float64, Layout.whole(example.shape), requires_grad=True))
    graph.output((graph.call_function(target, (x, *arguments)),))
    inputs, outputs = (Input("x", InputKind.PARAMETER, "x"),), (Output(OutputKind.USER, ""),)
    return Program(graph, mesh, Plan(), inputs, outputs)


def _forward_and_backward(
    name: str, arguments: tuple[Any, ...], x: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results, a gradient for each of them, and the gradient of ``x`` that the registered derivative gives."""
    mesh = Mesh(tp=len(x))
    role = role_of(_program(getattr(comm.OPS, name).default, arguments, mesh, x[0]))
    lockstep = Lockstep(mesh)
    results, *saved = lockstep.run(role.forward, [list(x)])
    alike = comm.COLLECTIVES[name].after in "IP"  # the gradient of such a value is one, and every rank has it
    same = torch.randn_like(results[0])
    given = [same if alike else torch.randn_like(part) for part in results]
    assert role.backward is not None
    (found,) = lockstep.run(role.backward, [*saved, list(given)])
    return results, given, found


def _equal(found: Any, expected: Any) -> None:
    close(found, expected, rtol=0, atol=1e-12)


# What the ranks hold, by how it lies on the axis: independent of the kernels, as a matrix on the flat whole value.


def _parts(name: str, form: str) -> tuple[Split, Split, int]:
    """The splits of a value that is split before and after collective ``name``, and the length of its dim."""
    if comm.COLLECTIVES[name].form is comm.ENDS:
        return Split(0, outer=2), Split(1), 24
    if comm.COLLECTIVES[name].form is comm.ORDERS:
        return Split(0), Split(0, outer=2, mirrored=True), 24
    split, length = (Split(0), 12) if comm.COLLECTIVES[name].form is comm.STEPS else SPLITS[form]
    return split, split, length


def _owned(split: Split, shape: list[int], position: int, ways: int) -> Tensor:
    """(elements of a part, elements of the whole): the part of ``position`` as a matrix; padding is rows of zeros."""
    numbers = torch.arange(shape[0] * shape[1]).reshape(shape)
    own = numbers.index_select(split.dim, owned_indices(shape[split.dim], split, position, ways))
    missing = -(-shape[split.dim] // ways) - own.shape[split.dim]
    padding = [0, 0] * (1 - split.dim) + [0, missing]
    own = torch.nn.functional.pad(own, padding, value=-1).flatten()
    return (own[:, None] == torch.arange(numbers.numel())).double()


def _laid_out(kind: str, split: Split, whole: Tensor, ways: int) -> list[Tensor]:
    """``whole`` as the ranks hold it, a function that autograd sees through; of P the summands are free."""
    if kind in "IR":
        return [whole] * ways
    assert kind == "S"
    shape = list(whole.shape)
    part = [-(-size // ways) if dim == split.dim else size for dim, size in enumerate(shape)]
    return [(_owned(split, shape, position, ways) @ whole.flatten()).view(part) for position in range(ways)]


def _used(kind: str, split: Split, whole: Tensor, gradients: list[Tensor]) -> Tensor:
    """The loss of which ``gradients`` are the gradients of what the ranks hold of ``whole``."""
    if kind in "IP":
        return (whole * gradients[0]).sum()
    terms = [(part * g).sum() for part, g in zip(_laid_out(kind, split, whole, len(gradients)), gradients)]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("form", SPLITS)
@pytest.mark.parametrize(
    "name", [name for name, row in comm.COLLECTIVES.items() if row.form not in (comm.SIZES, comm.NOTE)]
)
def test_every_collective_and_its_gradient_are_the_map_that_the_table_says(name: str, form: str, ways: int) -> None:
    """A collective changes how a value lies and not the value, so that its rows say what autograd has to give."""
    row = comm.COLLECTIVES[name]
    before, after, length = _parts(name, form)
    torch.manual_seed(0)
    shape = [24, 12] if row.form is comm.ENDS else _shape(before, length)
    if row.before == "P":
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(ways)]
        whole = torch.stack(leaves).sum(0)
        x = [leaf.detach() for leaf in leaves]
    else:
        leaves = [whole := torch.randn(shape, dtype=torch.float64, requires_grad=True)]
        x = [part.detach() for part in _laid_out(row.before, before, whole, ways)]
    known = {
        "axis": "tp", "ways": ways, "op": "sum", "dim": before.dim, "outer": before.signed_outer,
        "ratio": [*before.ratio], "length": length, "source": [before.dim, before.signed_outer, *before.ratio],
        "target": [after.dim, after.signed_outer, *after.ratio], "by": STEPS[form],
    }  # fmt: skip
    results, given, found = _forward_and_backward(name, tuple(known[p] for p in row.form.parameters), x)
    if row.form is comm.STEPS:
        whole = whole.roll(STEPS[form] * (length // ways), 0)  # the one that changes the value, not how it lies
    if row.after == "P":
        _equal(torch.stack(results).sum(0), whole)
    else:
        _equal(results, _laid_out(row.after, after, whole, ways))
    expected = torch.autograd.grad(_used(row.after, after, whole, given), leaves)
    if row.before == "R":
        _equal(torch.stack(found).sum(0), expected[0])
    elif row.before == "S":
        _equal(found, _laid_out("S", before, expected[0], ways))
    else:
        _equal(found, [expected[0]] * ways)  # one gradient, on every rank


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("form", SPLITS)
def test_splitting_and_gathering_are_inverse(form: str, ways: int) -> None:
    split, length = SPLITS[form]
    whole = torch.randn(_shape(split, length))
    arguments = comm.where(split, "tp", ways, length)
    parts = collective("split", [whole] * ways, arguments)
    assert all(part.shape[split.dim] == -(-length // ways) for part in parts)
    assert all(torch.equal(joined, whole) for joined in collective("all_gather", parts, arguments))
    padded = collective("pad", parts, arguments)
    assert torch.equal(sum(padded, torch.zeros_like(whole)), whole)
    scattered = collective("reduce_scatter", padded, arguments)
    assert all(torch.equal(a, b) for a, b in zip(scattered, parts, strict=True))


def test_reductions() -> None:
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])]
    assert collective("all_reduce", parts, ("tp", "sum"))[1].tolist() == [4.0, 7.0]
    assert collective("all_reduce", parts, ("tp", "max"))[0].tolist() == [3.0, 5.0]
    assert collective("all_reduce", parts, ("tp", "min"))[0].tolist() == [1.0, 2.0]
    assert [part.tolist() for part in collective("keep_first", parts, ("tp",))] == [[1.0, 5.0], [0.0, 0.0]]


def test_groups_are_the_fibres_of_the_mesh() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    position = graph.call_function(comm.OPS.axis_index.default, ("tp",))
    total = graph.call_function(comm.OPS.all_reduce.default, (x, "dp", "sum"))
    graph.output((total, position))
    mesh = Mesh(dp=2, tp=2)
    lockstep = Lockstep(mesh)
    total_found, positions = lockstep.run(graph, [[torch.tensor(10.0**rank) for rank in range(4)]])
    assert [int(value) for value in total_found] == [101, 1010, 101, 1010]
    assert [int(value) for value in positions] == [0, 1, 0, 1]
    (transfer,) = lockstep.traffic
    assert (transfer.axis, transfer.name, transfer.operations, transfer.bytes) == ("dp", "all_reduce", 1, 4)


def test_bytes_are_those_of_ring_algorithms() -> None:
    assert moved_bytes("all_reduce", 4, 1000) == 1500
    assert moved_bytes("reduce_scatter", 4, 1000) == 750
    assert moved_bytes("all_gather", 4, 250) == 750
    assert moved_bytes("all_to_all", 4, 1000) == 750
    assert moved_bytes("split", 4, 1000) == 0
    assert all(moved_bytes(name, 1, 1000) == 0 for name in comm.MOVING)


def test_values_die_at_their_last_use() -> None:
    graph = fx.Graph()
    last = graph.placeholder("x")
    for _ in range(10):
        last = graph.call_function(torch.ops.aten.add.Tensor, (last, 1.0))
    graph.output((last,))
    lockstep = Lockstep(Mesh(tp=2))
    lockstep.run(graph, [[torch.zeros(100) for _ in range(2)]])
    assert [memory.peak for memory in lockstep.memory] == [800, 800]
    assert [memory.live for memory in lockstep.memory] == [400, 400]
