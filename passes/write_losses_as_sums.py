"""Write a mean loss as a global sum over a global count, so that splitting tokens cannot turn it into a mean of means.

loss = aten.cross_entropy_loss(logits, target) : f32[]
  -->
sums  = op.cross_entropy_sums(logits, target, None, -100, 0.0) : f32[], f32[]
total = sums[0]                                                : f32[]
count = sums[1]                                                : f32[]
loss  = aten.div.Tensor(total, count)                          : f32[]
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from autopar import operators
from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import Layout
from autopar.ir.node import Value, origin, set_origin, set_values, value
from autopar.ir.program import Program

aten = torch.ops.aten
_MEAN, _SUM = 1, 2


@graph_pass()
def write_losses_as_sums(program: Program) -> Program:
    for node in list(program.graph.nodes):
        if node.target is aten.cross_entropy_loss.default:
            _rewrite(program.graph, node)
        elif node.target is aten.mse_loss.default:
            _rewrite_squares(program.graph, node)
    program.graph.eliminate_dead_code()
    return program


def _add(graph: fx.Graph, like: fx.Node, target: object, args: tuple[object, ...], *types: Value) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    set_values(node, *types)
    set_origin(node, origin(like))
    return node


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    defaults = dict(zip(names, (None, None, None, _MEAN, -100, 0.0)))
    given = {**defaults, **dict(zip(names, node.args)), **node.kwargs}
    if given["reduction"] not in (_MEAN, _SUM) or _is_floating(given["target"]):
        return  # one loss per token, or probabilities as targets: these have rules of their own
    before = value(node)
    wide = torch.promote_types(before.dtype, torch.float32)
    scalar = Value(wide, Layout(()), before.requires_grad)
    count_type = Value(wide, Layout(()), False)
    arguments = tuple(given[name] for name in ("self", "target", "weight", "ignore_index", "label_smoothing"))
    with graph.inserting_before(node):
        sums = _add(graph, node, operators.cross_entropy_sums, arguments, scalar, count_type)
        total = _add(graph, node, operator.getitem, (sums, 0), scalar)
        result = total
        if given["reduction"] == _MEAN:
            count = _add(graph, node, operator.getitem, (sums, 1), count_type)
            result = _add(graph, node, aten.div.Tensor, (total, count), scalar)
        if wide != before.dtype:
            result = graph.call_function(aten._to_copy.default, (result,), {"dtype": before.dtype})
            set_values(result, before)
            set_origin(result, origin(node))
    node.replace_all_uses_with(result)


def _is_floating(target: object) -> bool:
    return isinstance(target, fx.Node) and value(target).dtype.is_floating_point


def _rewrite_squares(graph: fx.Graph, node: fx.Node) -> None:
    """mse_loss(a, b) -> mean or sum of (a - b)^2, operators that have rules."""
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    reduction = node.args[2] if len(node.args) > 2 else node.kwargs.get("reduction", _MEAN)
    wide = first if value(first).shape else second
    full = Value(value(node).dtype, value(wide).layout, value(node).requires_grad)
    with graph.inserting_before(node):
        difference = _add(graph, node, aten.sub.Tensor, (first, second), full)
        squares = _add(graph, node, aten.mul.Tensor, (difference, difference), full)
        if reduction in (_MEAN, _SUM):
            target = aten.mean.default if reduction == _MEAN else aten.sum.default
            squares = _add(graph, node, target, (squares,), value(node))
    node.replace_all_uses_with(squares)
