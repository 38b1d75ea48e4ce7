"""Write training-mode batch_norm as sums over the whole batch, so that a split batch has the statistics of the whole.

    y, ... = aten._native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, 1e-05)
      -->
    mean    = aten.mean.dim(x, [0, 2, 3], True)
    centred = aten.sub.Tensor(x, mean)
    squares = aten.mul.Tensor(centred, centred)
    var     = aten.mean.dim(squares, [0, 2, 3], True)
    y       = centred * rsqrt(var + eps) * w + b, and the new running statistics from mean and var

Only where some axis splits the batch; otherwise torch's own kernel stays. As that one does, it computes in float32
where ``x`` is of 16 bits.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import substitute
from autopar.mesh import BATCH_AXES

aten = torch.ops.aten


@graph_pass(when=lambda program: any(program.mesh.size(axis) > 1 for axis in BATCH_AXES))
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
