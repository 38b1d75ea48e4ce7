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
before every use keeps its reductions apart, since its gradient is a sum of parts over different ranks.

With ZeRO the axes that parameters are split over are merged, without ``dp_replicate``: that reduces the parts, after
they have been scattered.
"""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, Program
from autopar.mesh import REPLICA_AXES, axes_of

ENTER, ALL_REDUCE = comm.OPS.enter.default, comm.OPS.all_reduce.default


def _is_needed(program: AnyProgram) -> bool:
    return sum(program.mesh.size(axis) > 1 for axis in REPLICA_AXES) > 1


@graph_pass(when=_is_needed)
def merge_reductions(program: Program) -> Program:
    data, sharding = frozenset(REPLICA_AXES), frozenset(axes_of(program.mesh.shard_axis or ""))
    for node in list(program.graph.nodes):
        if node.target is ALL_REDUCE:
            _merge(program, node, data)
        elif node.target is ENTER:
            _merge(program, node, sharding if program.plan.zero else data)
    return program


def _merge(program: Program, second: fx.Node, axes: Set[str]) -> None:
    """Merge ``second`` with the same collective in front of it, where both are over ``axes``."""
    first = second.args[0]
    assert isinstance(first, fx.Node)
    if first.target is not second.target or len(first.users) > 1 or first.args[2:] != second.args[2:]:
        return
    if not comm.axes_over(first) | comm.axes_over(second) <= axes:
        return
    axis = program.mesh.merged([str(first.args[1]), str(second.args[1])])
    op = Builder(before=second)
    merged = op(second.target, first.args[0], axis, *second.args[2:], like=value(second))
    second.replace_all_uses_with(merged)
    program.graph.erase_node(second)
    program.graph.erase_node(first)
