"""The builder: types of what is inserted, where it goes, and what it refuses to know."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from autopar import operators
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Layout
from autopar.ir.node import Origin, Value, origin, set_origin, value, values
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh

aten = torch.ops.aten

TEXT = """
program mesh(dp=2)
  w   = param w                  : f32[6,4]
  x   = input x                  : f32[8@dp,4] nograd
  b   = buffer b                 : bf16[4] nograd
  ids = input ids                : i64[6] nograd
  y   = aten.linear(x, w)        : f32[8@dp,6]
  z   = aten.relu(y)             : f32[8@dp,6]
  return z
"""


@pytest.fixture
def program() -> Program:
    return parse(TEXT)


def node_of(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)


def names(program: Program) -> list[str]:
    return [node.name for node in program.graph.nodes if node.op == "call_function"]


def test_sizes_dtype_and_gradient_are_what_the_operator_makes_of_its_operands(program: Program) -> None:
    w, b = node_of(program, "w"), node_of(program, "b")
    op = Builder(before=node_of(program, "y"))
    turned = op(aten.transpose.int, w, 0, 1)
    assert value(turned) == Value(torch.float32, Layout.whole((4, 6)), requires_grad=True)
    assert value(op(aten.mul.Tensor, w, b)) == Value(torch.float32, Layout.whole((6, 4)), requires_grad=True)
    assert value(op(aten.add.Tensor, b, 1.0)) == Value(torch.bfloat16, Layout.whole((4,)))
    assert value(op(aten.detach.default, w)) == Value(torch.float32, Layout.whole((6, 4)))
    assert value(op(aten.gt.Scalar, w, 0)) == Value(torch.bool, Layout.whole((6, 4)))
    assert value(op(aten.arange.default, 5)) == Value(torch.int64, Layout.whole((5,)))


def test_in_the_graph_of_a_rank_types_are_those_of_equal_calls_only(program: Program) -> None:
    """They are remembered; 2, 2.0 and True are not the same, nor are operands of other sizes and dtypes."""
    y, ids, b = (node_of(program, name) for name in ("y", "ids", "b"))
    op = Builder(before=node_of(program, "z"), mesh=program.mesh)
    for _ in range(2):
        assert value(op(aten.mul.Tensor, ids, 2)) == Value(torch.int64, Layout.whole((6,)))
        assert value(op(aten.mul.Tensor, ids, 2.0)) == Value(torch.float32, Layout.whole((6,)))
        assert value(op(aten.mul.Tensor, b, 2)) == Value(torch.bfloat16, Layout.whole((4,)))
        assert value(op(aten.mul.Tensor, y, 2)) == Value(torch.float32, Layout.whole((4, 6)))
        assert value(op(aten.sum.dim_IntList, y, [1], True)) == Value(torch.float32, Layout.whole((4, 1)))
        assert value(op(aten.sum.dim_IntList, y, [1], False)) == Value(torch.float32, Layout.whole((4,)))
        assert value(op(aten.sum.dim_IntList, y, [1], dtype=torch.float64)).dtype == torch.float64
        assert value(op(aten.cat.default, [y, y])) == Value(torch.float32, Layout.whole((8, 6)))
        assert value(op(aten.cat.default, [y, y, y])) == Value(torch.float32, Layout.whole((12, 6)))


def test_several_results_each_have_their_type(program: Program) -> None:
    op = Builder(before=node_of(program, "y"))
    most = op(aten.topk.default, node_of(program, "w"), 2)
    assert [kind.requires_grad for kind in values(most)] == [True, False]
    assert value(op(operator.getitem, most, 1)) == Value(torch.int64, Layout.whole((6, 2)))
    arguments = (node_of(program, "w"), node_of(program, "ids"), None, -100, 0.0)
    sums = op(operators.cross_entropy_sums, *arguments)  # an operator of our own; the count has no gradient
    assert values(sums) == (Value(torch.float32, Layout(()), True), Value(torch.float32, Layout(()), False))


def test_operators_go_where_they_are_wanted_in_the_order_in_which_they_come(program: Program) -> None:
    y = node_of(program, "y")
    set_origin(y, Origin("up", "model.py:3 in forward"))
    w = node_of(program, "w")
    before, after = Builder(before=y), Builder(after=y)
    for op in (before, after):
        first, second = op(aten.neg.default, w), op(aten.abs.default, w, name="second")
        assert origin(first) == origin(second) == origin(y)
    assert names(program) == ["neg", "second", "y", "neg_1", "second_1", "z"]


def test_what_has_the_shape_or_dtype_already_is_left_alone(program: Program) -> None:
    w, op = node_of(program, "w"), Builder(before=node_of(program, "y"))
    assert op.reshape(w, 6, 4) is w and op.cast(w, torch.float32) is w
    assert op.shape(op.reshape(w, 24)) == (24,)
    assert value(op.cast(w, torch.int32)) == Value(torch.int32, Layout.whole((6, 4)), requires_grad=False)


@pytest.mark.parametrize("target", [aten.relu.default, aten.neg.default])
def test_of_a_split_operand_only_a_rule_knows_the_result(program: Program, target: object) -> None:
    x, y = node_of(program, "x"), node_of(program, "y")
    before = names(program)
    with pytest.raises(InvariantError, match=r"operand x lies \[8@dp,4\].*\n.*like="):
        Builder(before=y)(target, x)
    assert names(program) == before, "nothing is left behind"
    assert value(Builder(before=y)(target, x, like=x)) == value(x)
    assert value(Builder(before=y).cast(x, torch.bfloat16)).layout == value(x).layout


def test_a_collective_needs_the_type_of_its_result(program: Program) -> None:
    w, op = node_of(program, "w"), Builder(before=node_of(program, "y"))
    with pytest.raises(InvariantError, match="comm.enter"):
        op(comm.OPS.enter.default, w, "dp")
    assert value(op(comm.OPS.enter.default, w, "dp", like=w)) == value(w)


def test_in_the_graph_of_a_rank_sizes_are_local_and_no_gradient_flows(program: Program) -> None:
    x, op = node_of(program, "x"), Builder(before=node_of(program, "y"), mesh=Mesh(dp=2))
    assert op.shape(x) == (4, 4)
    assert value(op(aten.t.default, node_of(program, "w"))) == Value(torch.float32, Layout.whole((4, 6)))
    assert value(op(aten.reshape.default, x, [2, 8])).shape == (2, 8)
    gathered = op(comm.OPS.all_gather.default, x, "dp", 2, 0, 1, [1], 8)
    assert value(gathered).shape == (8, 4)


def test_an_operator_that_does_not_take_these_operands_is_refused(program: Program) -> None:
    w, op = node_of(program, "w"), Builder(before=node_of(program, "y"))
    before = names(program)
    with pytest.raises(InvariantError, match=r"mm: aten.mm of w float32\[6, 4\] has no type"):
        op(aten.mm.default, w, w)
    with pytest.raises(InvariantError, match=r"aten.nonzero of w .*\n.*like="):
        op(aten.nonzero.default, w)
    assert names(program) == before
