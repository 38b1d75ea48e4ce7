"""Collectives on ranks in lock-step: each operator, and that its registered backward is its dual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.autodiff.differentiate import role_of
from autopar.ir import collectives as comm
from autopar.ir.layout import Layout, Split
from autopar.ir.node import Value, set_values
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.ir.traffic import moved_bytes
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.simulator.lockstep import Lockstep, collective, join, take

SPLITS = {
    "even": (Split(0), 12),
    "second dim": (Split(1), 12),
    "uneven": (Split(0), 7),
    "fewer than ranks": (Split(1), 2),
    "blocks": (Split(0, outer=2), 24),
    "ratio": (Split(1, ratio=(2, 1)), 36),
}
WAYS = (1, 2, 3, 4)

# operator -> kind of its argument and of its result: Invariant, Replicated, Split, Partial
KINDS = {
    "enter": "I R",
    "release": "R I",
    "keep_first": "I P",
    "all_reduce": "P I",
    "all_gather": "S R",
    "all_gather_invariant": "S I",
    "reduce_scatter": "P S",
    "split": "I S",
    "split_replicated": "R S",
    "pad": "S P",
}
PLAIN = ("enter", "release", "keep_first", "all_reduce")


def _shape(split: Split, length: int) -> list[int]:
    return [length if dim == split.dim else 5 for dim in range(2)]


def _values(kind: str, split: Split, length: int, ways: int) -> list[Tensor]:
    """One value of ``kind``, as the ranks hold it."""
    whole = torch.randn(_shape(split, length), dtype=torch.float64)
    if kind in "IR":
        return [whole] * ways
    if kind == "S":
        return [take(whole, split, position, ways) for position in range(ways)]
    return [torch.randn_like(whole) for _ in range(ways)]


def _gradients(kind: str, values: list[Tensor]) -> list[Tensor]:
    """A gradient for a value of ``kind``: that of I and P is whole and alike, of R a part on each rank."""
    if kind in "IP":
        return [torch.randn_like(values[0])] * len(values)
    return [torch.randn_like(value) for value in values]


def _pairing(kind: str, values: list[Tensor], gradients: list[Tensor]) -> float:
    terms = [float((value * gradient).sum()) for value, gradient in zip(values, gradients, strict=True)]
    return terms[0] if kind == "I" else sum(terms)


def _program(target: Any, arguments: tuple[Any, ...], mesh: Mesh, example: Tensor) -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    set_values(x, Value(torch.float64, Layout.whole(example.shape), requires_grad=True))
    graph.output((graph.call_function(target, (x, *arguments)),))
    inputs, outputs = (Input("x", InputKind.PARAMETER, "x"),), (Output(OutputKind.USER, ""),)
    return Program(graph, mesh, Plan(), inputs, outputs)


def _forward_and_backward(
    target: Any, arguments: tuple[Any, ...], kind: str, x: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results, a random gradient for them, and the gradient of ``x`` that the registered derivative gives."""
    mesh = Mesh(tp=len(x))
    role = role_of(_program(target, arguments, mesh, x[0]))
    lockstep = Lockstep(mesh)
    results, *saved = lockstep.run(role.forward, [x])
    given = _gradients(kind, results)
    assert role.backward is not None
    (found,) = lockstep.run(role.backward, [*saved, given])
    return results, given, found


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("form", SPLITS)
@pytest.mark.parametrize("name", KINDS)
def test_the_backward_of_each_operator_is_its_dual(name: str, form: str, ways: int) -> None:
    split, length = SPLITS[form]
    before, after = KINDS[name].split()
    torch.manual_seed(0)
    x = _values(before, split, length, ways)
    arguments: tuple[Any, ...] = ("tp", "sum") if name == "all_reduce" else ("tp",)
    if name not in PLAIN:
        arguments = comm.where(split, "tp", ways, length)
    results, given, found = _forward_and_backward(getattr(comm.OPS, name).default, arguments, after, x)
    assert [part.shape for part in found] == [part.shape for part in x]
    assert abs(_pairing(after, results, given) - _pairing(before, x, found)) < 1e-10
    if before in "IP":
        assert all(torch.equal(part, found[0]) for part in found)


@pytest.mark.parametrize("ways", WAYS)
def test_the_backward_of_all_to_all_is_its_dual(ways: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(24, 12, dtype=torch.float64)
    source, target = Split(0, outer=2), Split(1)
    x = [take(whole, source, position, ways) for position in range(ways)]
    arguments = ("tp", ways, [0, 2, 1], [1, 1, 1])
    results, given, found = _forward_and_backward(comm.OPS.all_to_all.default, arguments, "S", x)
    assert torch.equal(join(results, target, 12), whole)
    assert abs(_pairing("S", results, given) - _pairing("S", x, found)) < 1e-10


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
