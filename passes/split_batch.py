"""Split the batch over ``dp`` (and ``ep``): inputs on their batch dim, and what depends on them; sums are reduced.

before, on mesh(dp=2):
  x    = input             : f32[8,4]
  w    = param w           : f32[2,4]
  y    = aten.linear(x, w) : f32[8,2]
  loss = aten.sum(y)       : f32[]
  return loss
after:
  x          = input                     : f32[8@dp,4]
  w          = param w                   : f32[2,4]
  enter      = comm.enter(w, dp)         : f32[2,4]
  y          = aten.linear(x, enter)     : f32[8@dp,2]
  loss       = aten.sum(y)               : f32[]{sum:dp}
  all_reduce = comm.all_reduce(loss, dp) : f32[]
  return all_reduce

The gradient all-reduce of a parameter is the dual of its ``enter``.
"""

from __future__ import annotations

from autopar.ir.batch import common_rows
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.program import Program
from autopar.mesh import DATA_AXES
from autopar.split.batch_policy import batch_policy
from autopar.split.choose import Choice
from autopar.split.flow import Flow
from autopar.split.rows_alone import outputs_in_parts
from autopar.split.shares import refuse_idle_axis
from autopar.split.split_axis import split_axis


@graph_pass(
    requires=(nothing_is_placed,),  # it is the first: axes that split a split dim again would cut other rows
    when=lambda program: any(program.mesh.size(axis) > 1 for axis in DATA_AXES),
)
def split_batch(program: Program) -> Program:
    for axis in DATA_AXES:
        if program.mesh.size(axis) > 1 and common_rows(program) != 1:  # one row is the batch of every rank
            program = split_axis(program, batch_policy(program, axis), _refuse_idle_axis)
    return outputs_in_parts(program)


def _refuse_idle_axis(flow: Flow, choice: Choice) -> None:
    refuse_idle_axis(flow, choice, least=0.0)
