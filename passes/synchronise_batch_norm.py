"""Write training-mode batch_norm as sums over the whole batch, so that a split batch has the statistics of the whole.

before, on mesh(dp=2):
  x   = input                                                                          : f32[8,3]
  m   = buffer mean                                                                    : f32[3]
  v   = buffer var                                                                     : f32[3]
  n = aten._native_batch_norm_legit_functional(x, None, None, m, v, True, 0.1, 0.01)
      : (f32[8,3], f32[3], f32[3], f32[3], f32[3])
  y   = n[0]                                                                           : f32[8,3]
  new = n[3]                                                                           : f32[3]
  return y, new
after:
  x         = input                                           : f32[8,3]
  m         = buffer mean                                     : f32[3]
  v         = buffer var                                      : f32[3]
  mean      = aten.mean.dim(x, [0], True)                     : f32[1,3]
  sub       = aten.sub.Tensor(x, mean)                        : f32[8,3]
  mul       = aten.mul.Tensor(sub, sub)                       : f32[8,3]
  mean_1    = aten.mean.dim(mul, [0], True)                   : f32[1,3]
  add       = aten.add.Tensor(mean_1, 0.01)                   : f32[1,3]
  rsqrt     = aten.rsqrt(add)                                 : f32[1,3]
  mul_1     = aten.mul.Tensor(sub, rsqrt)                     : f32[8,3]
  detach    = aten.detach(mean)                               : f32[1,3]
  reshape   = aten.reshape(detach, [3])                       : f32[3]
  detach_1  = aten.detach(rsqrt)                              : f32[1,3]
  reshape_1 = aten.reshape(detach_1, [3])                     : f32[3]
  detach_2  = aten.detach(mean)                               : f32[1,3]
  reshape_2 = aten.reshape(detach_2, [3])                     : f32[3]
  mul_2     = aten.mul.Tensor(reshape_2, 0.1)                 : f32[3]
  mul_3     = aten.mul.Tensor(m, 0.9)                         : f32[3]
  add_1     = aten.add.Tensor(mul_3, mul_2)                   : f32[3]
  detach_3  = aten.detach(mean_1)                             : f32[1,3]
  reshape_3 = aten.reshape(detach_3, [3])                     : f32[3]
  mul_4     = aten.mul.Tensor(reshape_3, 0.11428571428571428) : f32[3]
  mul_5     = aten.mul.Tensor(v, 0.9)                         : f32[3]
  add_2     = aten.add.Tensor(mul_5, mul_4)                   : f32[3]
  return mul_1, add_1

Weight and bias, where there are any, come last. The pass applies only where some axis splits the batch; otherwise
torch's own kernel stays. Like that kernel, the sums are computed in float32 where ``x`` has 16 bits.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import substitute
from autopar.mesh import DATA_AXES

aten = torch.ops.aten


@graph_pass(
    requires=(nothing_is_placed,),
    when=lambda program: any(program.mesh.size(axis) > 1 for axis in DATA_AXES),
)
def synchronise_batch_norm(program: Program) -> Program:
    for node in list(program.graph.nodes):
        if node.target is aten._native_batch_norm_legit_functional.default and node.args[5]:
            _write_out(program.graph, node)
    return program


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, running_mean, running_var, _, momentum, epsilon = node.args
    assert isinstance(x, fx.Node) and isinstance(epsilon, float) and isinstance(momentum, float)
    op = Builder(before=node)
    dtype, wide = value(x).dtype, torch.promote_types(value(x).dtype, torch.float32)
    x = op.cast(x, wide)
    sizes = value(x).shape
    dims = [d for d in range(len(sizes)) if d != 1]
    count = math.prod(sizes[d] for d in dims)
    column = [size if d == 1 else 1 for d, size in enumerate(sizes)]
    mean = op(aten.mean.dim, x, dims, True)
    centred = op(aten.sub.Tensor, x, mean)
    squares = op(aten.mul.Tensor, centred, centred)
    variance = op(aten.mean.dim, squares, dims, True)
    inverse = op(aten.rsqrt.default, op(aten.add.Tensor, variance, epsilon))
    y = op(aten.mul.Tensor, centred, inverse)
    for parameter, combine in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if isinstance(parameter, fx.Node):
            y = op(combine, y, op(aten.reshape.default, parameter, column))
    results = {
        0: op.cast(y, dtype),
        1: _flat(op, mean),
        2: _flat(op, inverse),
        3: _running(op, running_mean, mean, momentum, 1.0),
        4: _running(op, running_var, variance, momentum, count / max(count - 1, 1)),
    }
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        substitute(user, results[index])
    graph.erase_node(node)


def _flat(op: Builder, statistic: fx.Node) -> fx.Node:
    return op(aten.reshape.default, op(aten.detach.default, statistic), [value(statistic).shape[1]])


def _running(op: Builder, old: fx.node.Argument, statistic: fx.Node, momentum: float, correction: float) -> fx.Node:
    """(1 - momentum) * old + momentum * correction * statistic."""
    assert isinstance(old, fx.Node)
    now = op.cast(op(aten.mul.Tensor, _flat(op, statistic), momentum * correction), value(old).dtype)
    return op(aten.add.Tensor, op(aten.mul.Tensor, old, 1.0 - momentum), now)
