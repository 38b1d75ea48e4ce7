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
  x         = input                                            : f32[8,3]
  m         = buffer mean                                      : f32[3]
  v         = buffer var                                       : f32[3]
  reshape   = aten.reshape(x, [2, 4, 3])                       : f32[2,4,3]
  mean      = aten.mean.dim(reshape, [1], True)                : f32[2,1,3]
  sub       = aten.sub.Tensor(reshape, mean)                   : f32[2,4,3]
  mul       = aten.mul.Tensor(sub, sub)                        : f32[2,4,3]
  mean_1    = aten.mean.dim(mul, [1], True)                    : f32[2,1,3]
  cat       = aten.cat([mean, mean_1], 1)                      : f32[2,2,3]
  var_mean  = aten.var_mean.correction(cat, [0], correction=0) : (f32[2,3], f32[2,3])
  getitem   = var_mean[0]                                      : f32[2,3]
  slice_1   = aten.slice.Tensor(getitem, 0, 0, 1)              : f32[1,3]
  slice_2   = aten.slice.Tensor(getitem, 0, 1, 2)              : f32[1,3]
  getitem_1 = var_mean[1]                                      : f32[2,3]
  slice_3   = aten.slice.Tensor(getitem_1, 0, 0, 1)            : f32[1,3]
  slice_4   = aten.slice.Tensor(getitem_1, 0, 1, 2)            : f32[1,3]
  add       = aten.add.Tensor(slice_4, slice_1)                : f32[1,3]
  add_1     = aten.add.Tensor(add, 0.01)                       : f32[1,3]
  rsqrt     = aten.rsqrt(add_1)                                : f32[1,3]
  cat_1     = aten.cat([slice_3, rsqrt])                       : f32[2,3]
  slice_5   = aten.slice.Tensor(cat_1, 0, 0, 1)                : f32[1,3]
  slice_6   = aten.slice.Tensor(cat_1, 0, 1, 2)                : f32[1,3]
  sub_1     = aten.sub.Tensor(x, slice_5)                      : f32[8,3]
  mul_1     = aten.mul.Tensor(sub_1, slice_6)                  : f32[8,3]
  detach    = aten.detach(slice_3)                             : f32[1,3]
  reshape_1 = aten.reshape(detach, [3])                        : f32[3]
  detach_1  = aten.detach(rsqrt)                               : f32[1,3]
  reshape_2 = aten.reshape(detach_1, [3])                      : f32[3]
  detach_2  = aten.detach(slice_3)                             : f32[1,3]
  reshape_3 = aten.reshape(detach_2, [3])                      : f32[3]
  mul_2     = aten.mul.Tensor(reshape_3, 0.1)                  : f32[3]
  mul_3     = aten.mul.Tensor(m, 0.9)                          : f32[3]
  add_2     = aten.add.Tensor(mul_3, mul_2)                    : f32[3]
  detach_3  = aten.detach(add)                                 : f32[1,3]
  reshape_4 = aten.reshape(detach_3, [3])                      : f32[3]
  mul_4     = aten.mul.Tensor(reshape_4, 0.11428571428571428)  : f32[3]
  mul_5     = aten.mul.Tensor(v, 0.9)                          : f32[3]
  add_3     = aten.add.Tensor(mul_5, mul_4)                    : f32[3]
  return mul_1, add_2

Weight and bias, where there are any, come last. Each rank computes the moments of its rows; those of all are gathered,
and in backward the gradients of mean and deviation are summed together: two collectives for a layer and step. Where the
ranks cannot have equal numbers of rows, the moments are sums over all rows, one after the other.

The pass applies only where some axis splits the batch; otherwise torch's own kernel stays. Like that kernel, the sums
are computed in float32 where ``x`` has 16 bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import substitute
from autopar.mesh import DATA_AXES, Mesh

aten = torch.ops.aten
FUNCTIONAL = aten._native_batch_norm_legit_functional.default
WITHOUT_RUNNING = aten._native_batch_norm_legit.no_stats  # track_running_stats=False


@graph_pass(
    requires=(nothing_is_placed,),
    when=lambda program: any(program.mesh.size(axis) > 1 for axis in DATA_AXES),
)
def synchronise_batch_norm(program: Program) -> Program:
    for node in list(program.graph.nodes):
        if node.target is FUNCTIONAL and node.args[5] or node.target is WITHOUT_RUNNING and node.args[3]:
            _write_out(program.graph, node, program.mesh)
    return program


def _write_out(graph: fx.Graph, node: fx.Node, mesh: Mesh) -> None:
    x, weight, bias, *running, _, momentum, epsilon = node.args
    assert isinstance(x, fx.Node) and isinstance(epsilon, float) and isinstance(momentum, float)
    op = Builder(before=node)
    dtype, wide = value(x).dtype, torch.promote_types(value(x).dtype, torch.float32)
    x = op.cast(x, wide)
    sizes = value(x).shape
    dims = [d for d in range(len(sizes)) if d != 1]
    count = math.prod(sizes[d] for d in dims)
    column = [size if d == 1 else 1 for d, size in enumerate(sizes)]
    groups = math.prod(mesh.size(axis) for axis in DATA_AXES)
    mean, variance = _moments(op, x, dims) if sizes[0] % groups else _moments_of_groups(op, x, groups)
    inverse = op(aten.rsqrt.default, op(aten.add.Tensor, variance, epsilon))
    both = op(aten.cat.default, [mean, inverse])  # one tensor enters the axis: their gradients are one sum
    shift, scale = _rows(op, both)
    y = op(aten.mul.Tensor, op(aten.sub.Tensor, x, shift), scale)
    for parameter, combine in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if isinstance(parameter, fx.Node):
            y = op(combine, y, op(aten.reshape.default, parameter, column))
    results = {
        0: op.cast(y, dtype),
        1: _flat(op, mean),
        2: _flat(op, inverse),
    }
    moments = (mean, 1.0), (variance, count / max(count - 1, 1))
    for place, (old, (moment, correction)) in enumerate(zip(running, moments), 3):
        results[place] = _running(op, old, moment, momentum, correction)
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        substitute(user, results[index])
    graph.erase_node(node)


def _moments(op: Builder, x: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, fx.Node]:
    """Mean and variance over ``dims``, which stay as dims of size 1."""
    mean = op(aten.mean.dim, x, dims, True)
    centred = op(aten.sub.Tensor, x, mean)
    return mean, op(aten.mean.dim, op(aten.mul.Tensor, centred, centred), dims, True)


def _moments_of_groups(op: Builder, x: fx.Node, groups: int) -> tuple[fx.Node, fx.Node]:
    """The same over all dims of (N, C, ...) but C, from the moments of equal groups of rows, which travel together.

    Mean of means, and mean of variances and of squared distances of the means (Chan, Golub and LeVeque 1979): all sums
    are of what is centred, so that nothing is lost where the mean is much larger than the deviation.
    """
    rows, *rest = value(x).shape
    grouped = op(aten.reshape.default, x, [groups, rows // groups, *rest])
    moments = _moments(op, grouped, [1, *range(3, len(rest) + 2)])
    both = op(aten.cat.default, list(moments), 1)
    spread = op(aten.var_mean.correction, both, [0], correction=0)  # needs all groups: so they are gathered, at once
    (apart, _), (mean, within) = (_rows(op, op(operator.getitem, spread, which)) for which in (0, 1))
    return mean, op(aten.add.Tensor, within, apart)


def _rows(op: Builder, both: fx.Node) -> tuple[fx.Node, fx.Node]:
    return op(aten.slice.Tensor, both, 0, 0, 1), op(aten.slice.Tensor, both, 0, 1, 2)


def _flat(op: Builder, statistic: fx.Node) -> fx.Node:
    return op(aten.reshape.default, op(aten.detach.default, statistic), [value(statistic).shape[1]])


def _running(op: Builder, old: fx.node.Argument, statistic: fx.Node, momentum: float, correction: float) -> fx.Node:
    """(1 - momentum) * old + momentum * correction * statistic."""
    assert isinstance(old, fx.Node)
    now = op.cast(op(aten.mul.Tensor, _flat(op, statistic), momentum * correction), value(old).dtype)
    return op(aten.add.Tensor, op(aten.mul.Tensor, old, 1.0 - momentum), now)
