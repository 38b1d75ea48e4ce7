"""Split the sequence over ``sp``: attention by ring, gathered keys, all-to-all or both; all else by its rules.

before, on mesh(sp=2), Plan(attention="ring", outputs="sharded"):
  x = input                                                        : f32[2,16,32]
  w = param w                                                      : f32[32,32]
  h = aten.linear(x, w)                                            : f32[2,16,32]
  r = aten.reshape(h, [2, 16, 4, 8])                               : f32[2,16,4,8]
  q = aten.transpose.int(r, 1, 2)                                  : f32[2,4,16,8]
  y = aten.scaled_dot_product_attention(q, q, q, None, 0.0, True)  : f32[2,4,16,8]
  return y
after:
  x              = input                                                       : f32[2,(2 8@sp~),32]
  w              = param w                                                     : f32[32,32]
  enter          = comm.enter(w, sp)                                           : f32[32,32]
  h              = aten.linear(x, enter)                                       : f32[2,(2 8@sp~),32]
  r              = aten.reshape(h, [2, 8, 4, 8])                               : f32[2,(2 8@sp~),4,8]
  q              = aten.transpose.int(r, 1, 2)                                 : f32[2,4,(2 8@sp~),8]
  axis_index     = comm.axis_index(sp)                                         : i64[]
  ring_attention = op.ring_attention(q, q, q, None, [], axis_index, "sp", 2, True, "j<=i", [1], None)
                 : f32[2,4,(2 8@sp~),8]
  reorder        = comm.reorder(ring_attention, sp, source=[2, -2, 1], target=2) : f32[2,4,16@sp,8]
  return reorder

The sequence dims are found from the attention operators, never from names: dim -2 of queries, keys and values, spread
backwards to the inputs and forwards to the loss (a model without attention: from its inputs). Positions, masks and
labels are whole, and are cut where they are used. Under a causal mask the parts are in zig-zag order, so that all ranks
have as much to compute; what is returned is in plain order again. (Liu et al. 2023, Ring Attention; Jacobs et al. 2023,
DeepSpeed-Ulysses; docs/sequence.md.)
"""

from __future__ import annotations

from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import whole_on
from autopar.ir.program import Program
from autopar.ir.tables import Decision
from autopar.split.choose import Choice
from autopar.split.flow import Flow
from autopar.split.gathered import decisions_of_gathered, warn_of_gathered
from autopar.split.sequence_axis import warn_of_written_out, with_even_lengths, with_own_heads
from autopar.split.shares import refuse_idle_axis
from autopar.split.split_axis import split_axis


@graph_pass(requires=(whole_on("sp"), whole_on("tp")), when=lambda program: program.mesh.size("sp") > 1)
def split_sequence(program: Program) -> Program:
    program = with_own_heads(program, "sp")
    policy = with_even_lengths(program, "sp")
    warn_of_written_out(program)

    def check(flow: Flow, choice: Choice) -> dict[str, Decision]:
        refuse_idle_axis(flow, choice)
        warn_of_gathered(flow, choice)
        return {**decisions_of_gathered(flow, choice), **policy.forms.decisions(flow)}

    return split_axis(program, policy, check)
