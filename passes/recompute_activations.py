"""Let backward recompute values of forward, block by block, rather than keep all that it needs.

before, on mesh(), Plan(recompute='selective'):
  forward:
    x = input             : f32[6,4]
    u = param u           : f32[8,4]
    w = param w           : f32[2,8]
    h = aten.linear(x, u) : f32[6,8]
    g = aten.gelu(h)      : f32[6,8]
    y = aten.linear(g, w) : f32[6,2]
    return y, saved w, saved h, saved g
  backward:
    w = saved                    : f32[2,8]
    h = saved                    : f32[6,8]
    g = saved                    : f32[6,8]
    t = grad at 0                : f32[6,2]
    m = aten.mm(t, w)            : f32[6,8]
    d = aten.gelu_backward(m, h) : f32[6,8]
    s = aten.t(t)                : f32[2,6]
    e = aten.mm(s, g)            : f32[2,8]
    return u=d, w=e
after:
  forward:
    x = input             : f32[6,4]
    u = param u           : f32[8,4]
    w = param w           : f32[2,8]
    h = aten.linear(x, u) : f32[6,8]
    g = aten.gelu(h)      : f32[6,8]
    y = aten.linear(g, w) : f32[6,2]
    return y, saved w, saved h
  backward:
    w = saved                    : f32[2,8]
    h = saved                    : f32[6,8]
    t = grad at 0                : f32[6,2]
    m = aten.mm(t, w)            : f32[6,8]
    d = aten.gelu_backward(m, h) : f32[6,8]
    g = aten.gelu(h)             : f32[6,8]
    s = aten.t(t)                : f32[2,6]
    e = aten.mm(s, g)            : f32[2,8]
    return u=d, w=e

``Plan.recompute`` says which values may be recomputed:

selective  elementwise operators, norms, softmax, casts; the results of matrix products, convolutions, attention,
           collectives and sorts are kept, and the others recomputed from them (Korthikanti et al. 2022, section 5,
           for any operator); with ``Plan(sequence="megatron")`` a rank keeps its part of the sequence, and gathers it
           over ``tp`` once more (section 4.2.2)
full       in repeated blocks everything, from the inputs of the block, as ``torch.utils.checkpoint`` around each layer
           does; collectives of ``tp`` within the block run again, as in Megatron's full recompute; a ring of attention
           does not: its result and log-sum-exp are kept; nor do rows go to their experts again: what arrived is kept
0.0 .. 1.0 between those: at most this fraction of the bytes that "none" keeps, with the least repeated work (a byte
           that a collective sends counts as 3000 operations); 0.0 is full

Minimum cuts find the best choice at each price (:mod:`autopar.autodiff.regions`), once for each block of equal
structure. The first blocks are the first to keep less, since backward frees the values of the last block at once.
Values that other blocks use are kept if backward needs them, so recomputation never leads from one block into the
next. A value is recomputed just before its first use and freed after its last. Operators and their order are those of
forward: the gradients are the same bit for bit, and so are random masks (positions and the seed determine them).
"""

from __future__ import annotations

from dataclasses import replace

from autopar.autodiff.differentiate import always_recomputed
from autopar.autodiff.partition import joined, partition
from autopar.autodiff.regions import Regions
from autopar.ir.graph_pass import graph_pass
from autopar.ir.program import Program
from autopar.ir.tables import Role


@graph_pass(when=lambda program: program.plan.recompute != "none")
def recompute_activations(program: Program) -> Program:
    return replace(program, role=_recomputed(program, program.required_role))


def _recomputed(program: Program, role: Role) -> Role:
    if role.backward is None:
        return role
    joint = joined(role.forward, role.backward, role.saved)
    free = always_recomputed(program)
    again = Regions(program, joint, free).recomputed()
    forward, backward, saved = partition(joint, lambda node: free(node) or node in again)
    return replace(role, forward=forward, backward=backward, saved=len(saved))
