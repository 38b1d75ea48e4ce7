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
  x          = input                                           : f32[8,3]
  m          = buffer mean                                     : f32[3]
  v          = buffer var                                      : f32[3]
  nan_to_num = aten.nan_to_num(m, 0.0, 0.0, 0.0)               : f32[3]
  reshape    = aten.reshape(nan_to_num, [1, 3])                : f32[1,3]
  sub        = aten.sub.Tensor(x, reshape)                     : f32[8,3]
  mul        = aten.mul.Tensor(sub, sub)                       : f32[8,3]
  mean       = aten.mean.dim(sub, [0], True)                   : f32[1,3]
  mean_1     = aten.mean.dim(mul, [0], True)                   : f32[1,3]
  cat        = aten.cat([mean, mean_1])                        : f32[2,3]
  slice_1    = aten.slice.Tensor(cat, 0, 0, 1)                 : f32[1,3]
  slice_2    = aten.slice.Tensor(cat, 0, 1, 2)                 : f32[1,3]
  mul_1      = aten.mul.Tensor(slice_1, slice_1)               : f32[1,3]
  sub_1      = aten.sub.Tensor(slice_2, mul_1)                 : f32[1,3]
  clamp_min  = aten.clamp_min(sub_1, 0.0)                      : f32[1,3]
  add        = aten.add.Tensor(clamp_min, 0.01)                : f32[1,3]
  rsqrt      = aten.rsqrt(add)                                 : f32[1,3]
  mul_2      = aten.mul.Tensor(slice_1, rsqrt)                 : f32[1,3]
  neg        = aten.neg(mul_2)                                 : f32[1,3]
  cat_1      = aten.cat([rsqrt, neg])                          : f32[2,3]
  slice_3    = aten.slice.Tensor(cat_1, 0, 0, 1)               : f32[1,3]
  slice_4    = aten.slice.Tensor(cat_1, 0, 1, 2)               : f32[1,3]
  mul_3      = aten.mul.Tensor(sub, slice_3)                   : f32[8,3]
  add_1      = aten.add.Tensor(mul_3, slice_4)                 : f32[8,3]
  add_2      = aten.add.Tensor(slice_1, reshape)               : f32[1,3]
  detach     = aten.detach(add_2)                              : f32[1,3]
  reshape_1  = aten.reshape(detach, [3])                       : f32[3]
  detach_1   = aten.detach(rsqrt)                              : f32[1,3]
  reshape_2  = aten.reshape(detach_1, [3])                     : f32[3]
  detach_2   = aten.detach(add_2)                              : f32[1,3]
  reshape_3  = aten.reshape(detach_2, [3])                     : f32[3]
  mul_4      = aten.mul.Tensor(reshape_3, 0.1)                 : f32[3]
  mul_5      = aten.mul.Tensor(m, 0.9)                         : f32[3]
  add_3      = aten.add.Tensor(mul_5, mul_4)                   : f32[3]
  detach_3   = aten.detach(clamp_min)                          : f32[1,3]
  reshape_4  = aten.reshape(detach_3, [3])                     : f32[3]
  mul_6      = aten.mul.Tensor(reshape_4, 0.11428571428571428) : f32[3]
  mul_7      = aten.mul.Tensor(v, 0.9)                         : f32[3]
  add_4      = aten.add.Tensor(mul_7, mul_6)                   : f32[3]
  return add_1, add_3

Weight and bias, where there are any, become part of the scale and the offset. Both moments travel in one all-reduce,
and in backward the gradients of scale and offset in one: two collectives for a layer and step.

The moments are those of ``x`` less the running mean, which all ranks have: the variance is what is left of two larger
numbers, and is rounded the less the nearer the running mean is to that of the batch (flax and XLA subtract nothing).
A running mean that is not finite counts as zero, so that one broken batch does not break all later ones.

The pass applies only where some axis splits the batch; otherwise torch's own kernel stays. Like that kernel, the sums
are computed in float32 where ``x`` has 16 bits.
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
    assert isinstance(running_mean, fx.Node)
    op = Builder(before=node)
    dtype, wide = value(x).dtype, torch.promote_types(value(x).dtype, torch.float32)
    sizes = value(x).shape
    dims = [d for d in range(len(sizes)) if d != 1]
    count = math.prod(sizes[d] for d in dims)
    column = [size if d == 1 else 1 for d, size in enumerate(sizes)]
    shift = op.cast(op(aten.reshape.default, op(aten.nan_to_num.default, running_mean, 0.0, 0.0, 0.0), column), wide)
    shifted = op(aten.sub.Tensor, op.cast(x, wide), shift)
    moments = _moments(op, shifted, dims)
    mean, variance = _mean_and_variance(op, moments)
    inverse = scale = op(aten.rsqrt.default, op(aten.add.Tensor, variance, epsilon))
    if isinstance(weight, fx.Node):
        scale = op(aten.mul.Tensor, scale, op(aten.reshape.default, weight, column))
    offset = op(aten.neg.default, op(aten.mul.Tensor, mean, scale))
    if isinstance(bias, fx.Node):
        offset = op(aten.add.Tensor, offset, op(aten.reshape.default, bias, column))
    scale, offset = _rows(op, op(aten.cat.default, [scale, offset]))  # one tensor enters the axis: one sum in backward
    y = op(aten.add.Tensor, op(aten.mul.Tensor, shifted, scale), offset)
    mean = op(aten.add.Tensor, mean, shift)
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


def _moments(op: Builder, shifted: fx.Node, dims: list[int]) -> fx.Node:
    """The means of ``shifted`` and of its squares over ``dims``, as rows of one tensor."""
    means = [op(aten.mean.dim, each, dims, True) for each in (shifted, op(aten.mul.Tensor, shifted, shifted))]
    return op(aten.cat.default, means)


def _mean_and_variance(op: Builder, moments: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Each a row; the variance is at least 0 where rounding would have it otherwise."""
    mean, square = _rows(op, moments)
    return mean, op(aten.clamp_min.default, op(aten.sub.Tensor, square, op(aten.mul.Tensor, mean, mean)), 0.0)


def _rows(op: Builder, both: fx.Node) -> tuple[fx.Node, fx.Node]:
    return op(aten.slice.Tensor, both, 0, 0, 1), op(aten.slice.Tensor, both, 0, 1, 2)


def _flat(op: Builder, statistic: fx.Node) -> fx.Node:
    return op(aten.reshape.default, op(aten.detach.default, statistic), [value(statistic).shape[1]])


def _running(op: Builder, old: fx.node.Argument, statistic: fx.Node, momentum: float, correction: float) -> fx.Node:
    """(1 - momentum) * old + momentum * correction * statistic."""
    assert isinstance(old, fx.Node)
    now = op.cast(op(aten.mul.Tensor, _flat(op, statistic), momentum * correction), value(old).dtype)
    return op(aten.add.Tensor, op(aten.mul.Tensor, old, 1.0 - momentum), now)
