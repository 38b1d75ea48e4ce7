"""Start collectives early and wait for them late, so that the computation between hides them.

before, on mesh(dp=2):
  forward:
    p = param w                       : f32[8@dp,4]
    a = input                         : f32[8,6]
    b = input                         : f32[6,8]
    y = aten.mm(a, b)                 : f32[8,8]
    w = comm.all_gather(p, dp, dim=0) : f32[8,4]
    z = aten.mm(y, w)                 : f32[8,4]
    return z
after:
  forward:
    p                = param w                             : f32[8@dp,4]
    a                = input                               : f32[8,6]
    b                = input                               : f32[6,8]
    start_all_gather = comm.start_all_gather(p, dp, dim=0) : f32[8,4]
    y                = aten.mm(a, b)                       : f32[8,8]
    wait             = comm.wait(start_all_gather, dp)     : f32[8,4]
    z                = aten.mm(y, wait)                    : f32[8,4]
    return z

Parameters are gathered ahead of their use: the next one always, more as far as ``Plan.overlap_mb`` limits the bytes
under way. Reductions of gradients are waited for at the end, or when they hold more than that. A sum that backward
needs next (tensor parallelism) is hidden by gradients of weights, which are delayed until it has started. The order is
the same on all ranks, and the numbers are the same bit for bit. (Li et al. 2020, PyTorch Distributed; Zhao et al. 2023,
PyTorch FSDP, section 3.3; Narayanan et al. 2021, Megatron-LM.)
"""

from __future__ import annotations

from autopar.autodiff.reorder import Reordering
from autopar.ir.graph_pass import graph_pass
from autopar.ir.program import Program


@graph_pass(when=lambda program: program.plan.overlap_mb > 0)
def overlap_collectives(program: Program) -> Program:
    limit = program.plan.overlap_mb * 1e6
    role = program.required_role
    for graph in {id(graph): graph for graph in role.graphs.values()}.values():
        Reordering(program.mesh, graph, limit, graph is role.backward).run()
    return program
