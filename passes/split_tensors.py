"""Split weights over ``tp``: columns then rows, attention by heads, the vocabulary of embedding, head and loss.

before, on mesh(tp=2):
  x    = input                : f32[4,8]
  up   = param up.weight      : f32[32,8]
  down = param down.weight    : f32[8,32]
  h    = aten.linear(x, up)   : f32[4,32]
  a    = aten.gelu(h)         : f32[4,32]
  y    = aten.linear(a, down) : f32[4,8]
  return y
after:
  x          = input                  : f32[4,8]
  up         = param up.weight        : f32[32@tp,8]
  down       = param down.weight      : f32[8,32@tp]
  h          = aten.linear(x, up)     : f32[4,32@tp]
  a          = aten.gelu(h)           : f32[4,32@tp]
  y          = aten.linear(a, down)   : f32[4,8]{sum:tp}
  all_reduce = comm.all_reduce(y, tp) : f32[4,8]
  return all_reduce

With ``Plan(sequence="megatron")`` activations between blocks are split along the sequence instead of held whole.
(Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.)
"""

from __future__ import annotations

from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import whole_on
from autopar.ir.program import Program
from autopar.routing.groups import kept_off_tensor_axis
from autopar.split.choose import Choice
from autopar.split.flow import Flow
from autopar.split.refusals import refuse_whole_weights
from autopar.split.shares import refuse_idle_axis
from autopar.split.split_axis import split_axis
from autopar.split.tensor_policy import TensorPolicy


@graph_pass(requires=(whole_on("tp"),))
def split_tensors(program: Program) -> Program:
    policy = TensorPolicy(program.plan.tensor, kept_off_tensor_axis(program))

    def check(flow: Flow, choice: Choice) -> None:
        refuse_whole_weights(flow, choice, policy.form)
        if program.plan.on_indivisible != "replicate" and not program.plan.tensor:  # else as the plan asks
            refuse_idle_axis(flow, choice, least=0.0, of_attention=0.0)  # one head of keys stays whole

    return split_axis(program, policy, check)
