"""Merge reductions over data-like axes: one all-reduce of a gradient over ``dp+sp``, not two in a row.

before, on mesh(dp=2 sp=2):
  w            = param w                      : f32[8,4]
  x            = input                        : f32[8@dp,6@sp,4]
  enter        = comm.enter(w, dp)            : f32[8,4]
  enter_1      = comm.enter(enter, sp)        : f32[8,4]
  y            = aten.linear(x, enter_1)      : f32[8@dp,6@sp,8]
  total        = aten.sum(y)                  : f32[]{sum:dp,sum:sp}
  all_reduce   = comm.all_reduce(total, sp)   : f32[]{sum:dp}
  all_reduce_1 = comm.all_reduce(all_reduce, dp) : f32[]
  return all_reduce_1
after:
  w            = param w                       : f32[8,4]
  x            = input                         : f32[8@dp,6@sp,4]
  enter_2      = comm.enter(w, dp+sp)          : f32[8,4]
  y            = aten.linear(x, enter_2)       : f32[8@dp,6@sp,8]
  total        = aten.sum(y)                   : f32[]{sum:dp,sum:sp}
  all_reduce_2 = comm.all_reduce(total, dp+sp) : f32[]
  return all_reduce_2

The dual of ``enter`` is the all-reduce of a gradient. A group of n ranks sends 2 (n-1)/n of the bytes, so that one over
2 x 4 ranks sends 1.75 times the gradient; two in a row send 1 and 1.5 times. A parameter that does not enter both axes
before every use keeps its reductions apart, since its gradient is a sum of parts over different ranks. The division of
a mean, between the sums over two axes, moves in front of both.

With ZeRO the axes that parameters are split over are merged, without ``dp_replicate``: that reduces the parts, after
they have been scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import PARTIAL
from autopar.ir.node import set_values, value
from autopar.ir.operator_facts import linear_in
from autopar.ir.program import AnyProgram, Program
from autopar.mesh import REPLICA_AXES, SHARD_AXES

ENTER, ALL_REDUCE = comm.OPS.enter.default, comm.OPS.all_reduce.default


def _is_needed(program: AnyProgram) -> bool:
    return sum(program.mesh.size(axis) > 1 for axis in REPLICA_AXES) > 1


@graph_pass(when=_is_needed)
def merge_reductions(program: Program) -> Program:
    data, sharding = frozenset(REPLICA_AXES), frozenset(SHARD_AXES)
    for node in list(program.graph.nodes):
        if node.target is ALL_REDUCE:
            _merge(program, node, data)
        elif node.target is ENTER:
            _merge(program, node, sharding if program.plan.zero else data)
    return program


def _merge(program: Program, second: fx.Node, axes: Set[str]) -> None:
    """Merge ``second`` with the same collective in front of it, where both are over ``axes``."""
    between = list(_scaling(second))
    first = (between or [second])[-1].args[0]
    assert isinstance(first, fx.Node)
    if first.target is not second.target or len(first.users) > 1 or first.args[2:] != second.args[2:]:
        return
    if not comm.axes_over(first) | comm.axes_over(second) <= axes:
        return
    for node in between:  # of a part of the sum now
        whole = value(node)
        set_values(node, replace(whole, layout=whole.layout.place(str(first.args[1]), PARTIAL, program.mesh)))
    (operand,) = first.all_input_nodes
    first.replace_all_uses_with(operand)
    axis = program.mesh.merged([str(first.args[1]), str(second.args[1])])
    op = Builder(before=second)
    second.replace_all_uses_with(op(second.target, second.args[0], axis, *second.args[2:], like=value(second)))
    program.graph.erase_node(second)
    program.graph.erase_node(first)


def _scaling(sum_of: fx.Node) -> Iterator[fx.Node]:
    """The operators in front of a sum over ranks, last first, that may as well follow it: a mean's division."""
    node = sum_of.args[0]
    while sum_of.args[2:] == ("sum",) and isinstance(node, fx.Node) and node.op == "call_function":
        alone = len(node.users) == 1 and node.all_input_nodes == [node.args[0]] and not value(node).shape
        if node.target in comm.TARGETS or not alone or frozenset((0,)) not in linear_in(node.target):
            return
        if value(node).dtype != value(node.all_input_nodes[0]).dtype:
            return  # the sum in front of a cast is in another precision
        yield node
        node = node.args[0]
