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
from dataclasses import replace

import torch
from torch import fx

from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import Layout
from autopar.ir.node import Value, value
from autopar.ir.program import Program
from autopar.ir.rewrite import insert_before, substitute
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
    given = value(x)
    full = replace(given, dtype=torch.promote_types(given.dtype, torch.float32))
    x = _cast(node, x, full)
    dims = [d for d in range(len(full.shape)) if d != 1]
    count = math.prod(full.shape[d] for d in dims)
    kept = replace(full, layout=Layout.whole([s if d == 1 else 1 for d, s in enumerate(full.shape)]))
    mean = insert_before(node, aten.mean.dim, (x, dims, True), None, kept)
    centred = insert_before(node, aten.sub.Tensor, (x, mean), None, full)
    squares = insert_before(node, aten.mul.Tensor, (centred, centred), None, full)
    variance = insert_before(node, aten.mean.dim, (squares, dims, True), None, kept)
    shifted = insert_before(node, aten.add.Tensor, (variance, epsilon), None, kept)
    inverse = insert_before(node, aten.rsqrt.default, (shifted,), None, kept)
    y = insert_before(node, aten.mul.Tensor, (centred, inverse), None, full)
    for parameter, combine in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if isinstance(parameter, fx.Node):
            column = replace(kept, dtype=value(parameter).dtype, requires_grad=value(parameter).requires_grad)
            shaped = insert_before(node, aten.reshape.default, (parameter, list(kept.shape)), None, column)
            y = insert_before(node, combine, (y, shaped), None, replace(full, requires_grad=True))
    results = {
        0: _cast(node, y, given),
        1: _flat(node, mean),
        2: _flat(node, inverse),
        3: _running(node, running_mean, mean, momentum, 1.0),
        4: _running(node, running_var, variance, momentum, count / max(count - 1, 1)),
    }
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        substitute(user, results[index])
    graph.erase_node(node)


def _cast(node: fx.Node, source: fx.Node, kind: Value) -> fx.Node:
    """``source`` in the dtype of ``kind``."""
    own = value(source)
    if own.dtype == kind.dtype:
        return source
    cast = replace(own, dtype=kind.dtype)
    return insert_before(node, aten._to_copy.default, (source,), {"dtype": kind.dtype}, cast)


def _flat(node: fx.Node, statistic: fx.Node) -> fx.Node:
    channels = value(statistic).shape[1]
    flat = replace(value(statistic), layout=Layout.whole([channels]), requires_grad=False)
    still = replace(value(statistic), requires_grad=False)
    stopped = insert_before(node, aten.detach.default, (statistic,), None, still)
    return insert_before(node, aten.reshape.default, (stopped, [channels]), None, flat)


def _running(node: fx.Node, old: fx.node.Argument, statistic: fx.Node, momentum: float, correction: float) -> fx.Node:
    """(1 - momentum) * old + momentum * correction * statistic."""
    assert isinstance(old, fx.Node)
    kind: Value = value(old)
    part = replace(kind, dtype=value(statistic).dtype)
    now = insert_before(node, aten.mul.Tensor, (_flat(node, statistic), momentum * correction), None, part)
    now = _cast(node, now, kind)
    before = insert_before(node, aten.mul.Tensor, (old, 1.0 - momentum), None, kind)
    return insert_before(node, aten.add.Tensor, (before, now), None, kind)
