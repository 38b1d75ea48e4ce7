"""Over what the values of graphs differ from rank to rank, on graphs of a few lines, and on whole programs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.layout import Layout
from autopar.ir.node import Value, set_values
from autopar.mesh import Mesh
from autopar.proof.relations import relations
from autopar.proof.varying import AbstractRun, Atoms, Varying
from tests.proof.mutated_programs import right
from tests.selection import slow_but

aten = torch.ops.aten
MESH = Mesh(dp=2, sp=4, tp=2)
GROUPS = ("dp", "tp", "dp+sp", "sp:inner2", "sp:outer2")
Build = Callable[[Any, fx.Node], Any]


def run(build: Build, over: str, size: tuple[int, ...] = (8,)) -> tuple[str, AbstractRun]:
    """In words, over what the result of ``build(call, x)`` differs for an ``x`` that differs over ``over``."""
    graph, kind = fx.Graph(), Value(torch.float32, Layout.whole(size))

    def call(target: Any, *args: Any, shape: Sequence[int] = size) -> fx.Node:
        operator = getattr(comm.OPS, target).default if isinstance(target, str) else target
        node = graph.call_function(operator, args)
        set_values(node, Value(kind.dtype, Layout.whole(tuple(shape))))
        return node

    x = graph.placeholder("x")
    set_values(x, kind)
    graph.output((build(call, x),))
    atoms = Atoms(MESH, GROUPS)
    found = AbstractRun(atoms)
    (result,) = found.run(graph, [Varying(atoms.of(over) if over else frozenset())])
    names = [name for name in ("dp", "sp:inner2", "sp:outer2", "tp") if atoms.of(name) <= result.over]
    return " ".join(names), found


ROWS: list[tuple[str, Build, str]] = [
    ("dp", lambda call, x: call("all_reduce", x, "dp", "sum"), ""),
    ("dp+sp", lambda call, x: call("all_reduce", x, "dp", "sum"), "sp:inner2 sp:outer2"),
    ("dp+sp", lambda call, x: call("all_reduce", x, "dp+sp", "sum"), ""),
    ("dp+sp", lambda call, x: call("all_reduce", x, "sp:inner2", "sum"), "dp sp:outer2"),
    ("sp", lambda call, x: call("all_reduce", call("all_reduce", x, "sp:inner2", "sum"), "sp:outer2", "sum"), ""),
    ("tp", lambda call, x: call("wait", call("start_all_reduce", x, "tp", "sum"), "tp"), ""),
    ("tp", lambda call, x: call("all_gather_invariant", x, "tp", 2, 0, 1, [1], 16, shape=(16,)), ""),
    ("", lambda call, x: call("split", x, "tp", 2, 0, 1, [1], 8, shape=(4,)), "tp"),
    ("", lambda call, x: call("keep_first", x, "tp"), "tp"),
    ("", lambda call, x: call(aten.mul.Tensor, x, call("axis_index", "dp")), "dp"),
    ("", lambda call, x: call("enter", x, "dp"), ""),
    ("sp", lambda call, x: call("shift", x, "sp", 4, 1), "sp:inner2 sp:outer2"),
    ("dp", lambda call, x: call(aten.add.Tensor, x, call("all_reduce", x, "dp", "sum")), "dp"),
    ("", lambda call, x: call(aten.bernoulli.p, x, 0.5), "dp sp:inner2 sp:outer2 tp"),
    ("", lambda call, x: call(aten.scaled_dot_product_attention.default, x, x, x, None, 0.0), ""),
    (
        "",
        lambda call, x: call(aten.scaled_dot_product_attention.default, x, x, x, None, 0.1),
        "dp sp:inner2 sp:outer2 tp",
    ),
]


@pytest.mark.parametrize("over, build, wanted", ROWS)
def test_operators(over: str, build: Build, wanted: str) -> None:
    found, seen = run(build, over)
    assert found == wanted and not seen.counted


@pytest.mark.parametrize("group, counted", [("dp", "dp"), ("dp+sp", "dp"), ("tp", "tp")])
def test_a_sum_of_what_is_the_same_is_counted(group: str, counted: str) -> None:
    _, seen = run(lambda call, x: call("all_reduce", x, group, "sum"), "sp")
    ((_, over),) = seen.counted
    assert seen.atoms.words(over) == counted


def test_the_largest_of_what_is_the_same_is_that() -> None:
    assert not run(lambda call, x: call("all_reduce", x, "dp", "max"), "")[1].counted


def _bucket(reduced: bool, start: int) -> Build:
    """``x``, which differs, and a value that is the same, or was reduced, in one bucket; the piece from ``start``."""

    def build(call: Any, x: fx.Node) -> fx.Node:
        other = call("all_reduce", x, "dp", "sum") if reduced else x
        joined = call(aten.cat.default, [x, other], shape=(16,))
        return call(aten.slice.Tensor, joined, 0, start, start + 8)  # type: ignore[no-any-return]

    return build


def test_pieces_of_a_bucket_are_looked_at_one_by_one() -> None:
    assert run(_bucket(True, 0), "dp")[0] == "dp"
    assert run(_bucket(True, 8), "dp")[0] == ""
    assert run(_bucket(True, 4), "dp")[0] == "dp"  # a part of both

    def summed(call: Any, x: fx.Node) -> fx.Node:
        joined = call(aten.cat.default, [x, call("all_reduce", x, "dp", "sum")], shape=(16,))
        return call("all_reduce", joined, "dp", "sum", shape=(16,))  # type: ignore[no-any-return]

    found, seen = run(summed, "dp")
    assert found == "" and len(seen.counted) == 1  # the second piece


@pytest.mark.parametrize("place, wanted", [(0, "tp"), (1, "dp"), (2, "")])
def test_each_result_of_a_backward_operator_has_its_own_sources(place: int, wanted: str) -> None:
    """A bias' gradient is a sum of those of the result, whatever the rank has of input and weight."""

    def build(call: Any, x: fx.Node) -> fx.Node:
        of_rank, weight = call(aten.mul.Tensor, x, call("axis_index", "dp")), call("keep_first", x, "tp")
        stride = ([8], [1], [0], [1], False, [0], 1, [True, True, True])
        every = call(aten.convolution_backward.default, x, of_rank, weight, *stride)
        return call(operator.getitem, every, place)  # type: ignore[no-any-return]

    assert run(build, "")[0] == wanted


GRADIENTS = "gradients that differ only where their parameter does"


@pytest.mark.parametrize("case", slow_but((0, 1, 2), ["buckets", "tied", "pipeline", "zero 3", "ulysses", "megatron"]))
def test_every_gradient_of_a_program(case: str) -> None:
    program = right(case)
    found = relations(program)
    grads = [name for part in program.parts for name in part.required_role.grads if not name[0].isdigit()]
    assert not found.refusals and found.facts[GRADIENTS] == len(grads)
