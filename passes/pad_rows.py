"""Put copies of the last rows behind a batch that the data axes do not divide, and let these copies count nothing.

before, on mesh(dp=2):
  x    = input                : f32[3,4]
  w    = param w              : f32[2,4]
  y    = aten.linear(x, w)    : f32[3,2]
  loss = aten.mean(y)         : f32[]
  return y, loss
after:
  c_padded_rows  = const padded_rows                         : i64[4]
  c_is_row       = const is_row                              : bool[4,1]
  c_real_rows    = const real_rows                           : i64[3]
  x              = input                                     : f32[3,4]
  w              = param w                                   : f32[2,4]
  index_select   = aten.index_select(x, 0, c_padded_rows)    : f32[4,4]
  y              = aten.linear(index_select, w)              : f32[4,2]
  where          = aten.where.ScalarOther(c_is_row, y, 0)    : f32[4,2]
  loss           = aten.mean(where)                          : f32[]
  mul            = aten.mul.Tensor(loss, 1.3333333333333333) : f32[]
  index_select_1 = aten.index_select(y, 0, c_real_rows)      : f32[3,2]
  return index_select_1, mul

The ranks run one program, so their parts of the batch are of one size. :mod:`autopar.split.padded_batch` says why
copies and not zeros, and what becomes of them. A single row stays as it is: it is the batch of every rank.
"""

from __future__ import annotations

from autopar.ir.batch import common_rows, is_padded
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.program import AnyProgram, Program
from autopar.ir.rewrite import drop_unused_constants
from autopar.split.padded_batch import PaddedBatch, places_of
from autopar.split.row_fillers import write_out_losses


def _needs_copies(program: AnyProgram) -> bool:
    return isinstance(program, Program) and common_rows(program) > 1 and is_padded(program)


@graph_pass(requires=(nothing_is_placed,), when=_needs_copies)
def pad_rows(program: Program) -> Program:
    write_out_losses(program.graph)
    padded = PaddedBatch(program, places_of(common_rows(program), program.mesh)).run()
    return drop_unused_constants(padded)
