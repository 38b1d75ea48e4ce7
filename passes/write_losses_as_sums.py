"""Write a mean loss as a global sum over a global count, so that splitting tokens cannot turn it into a mean of means.

before:
  logits = input                                   : f32[6,9]
  target = input                                   : i64[6]
  loss   = aten.cross_entropy_loss(logits, target) : f32[]
  return loss
after:
  logits             = input                                                  : f32[6,9]
  target             = input                                                  : i64[6]
  cross_entropy_sums = op.cross_entropy_sums(logits, target, None, -100, 0.0) : (f32[], f32[])
  getitem            = cross_entropy_sums[0]                                  : f32[]
  getitem_1          = cross_entropy_sums[1]                                  : f32[]
  div_tensor         = aten.div.Tensor(getitem, getitem_1)                    : f32[]
  return div_tensor
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar import operators
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.label_counts import label_count
from autopar.ir.node import value
from autopar.ir.program import Program

aten = torch.ops.aten
_MEAN, _SUM = 1, 2
NLL = (aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)


@graph_pass(requires=(nothing_is_placed,))
def write_losses_as_sums(program: Program) -> Program:
    for node in list(program.graph.nodes):
        if node.target is aten.cross_entropy_loss.default:
            _rewrite(node)
        elif node.target in NLL:
            _rewrite_likelihoods(node)
        elif node.target is aten.mse_loss.default:
            _rewrite_squares(node)
    program.graph.eliminate_dead_code()
    return program


def _rewrite(node: fx.Node) -> None:
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    defaults = dict(zip(names, (None, None, None, _MEAN, -100, 0.0)))
    given = {**defaults, **dict(zip(names, node.args)), **node.kwargs}
    if given["reduction"] not in (_MEAN, _SUM) or _is_floating(given["target"]):
        return  # one loss per token, or probabilities as targets: these have rules of their own
    op = Builder(before=node)
    arguments = (given[name] for name in ("self", "target", "weight", "ignore_index", "label_smoothing"))
    sums = op(operators.cross_entropy_sums, *arguments)
    result = op(operator.getitem, sums, 0)
    if given["reduction"] == _MEAN:
        result = op(aten.div.Tensor, result, op(operator.getitem, sums, 1), name="div_tensor")
    if value(result).dtype != value(node).dtype:
        result = op(aten._to_copy.default, result, dtype=value(node).dtype, name="_to_copy_default")
    node.replace_all_uses_with(result)


def _is_floating(target: object) -> bool:
    return isinstance(target, fx.Node) and value(target).dtype.is_floating_point


def _rewrite_likelihoods(node: fx.Node) -> None:
    """nll_loss of chances -> the sum over the labels that count, over their number or the weights of their classes."""
    names = ("self", "target", "weight", "reduction", "ignore_index")
    given: dict[str, Any] = {**dict(zip(names, (None, None, None, _MEAN, -100))), **dict(zip(names, node.args))}
    given |= node.kwargs
    if given["reduction"] != _MEAN:
        return
    op = Builder(before=node)
    target, weight, ignored = given["target"], given["weight"], given["ignore_index"]
    total = op(node.target, given["self"], target, weight, _SUM, ignored)
    count = label_count(op, target, weight, ignored, value(node).dtype)
    node.replace_all_uses_with(op(aten.div.Tensor, total, count, name="div_tensor"))


def _rewrite_squares(node: fx.Node) -> None:
    """mse_loss(a, b) -> mean or sum of (a - b)^2, which are operators that have rules."""
    first, second = node.args[:2]
    reduction = node.args[2] if len(node.args) > 2 else node.kwargs.get("reduction", _MEAN)
    op = Builder(before=node)
    difference = op(aten.sub.Tensor, first, second, name="sub_tensor")
    result = op(aten.mul.Tensor, difference, difference, name="mul_tensor")
    if reduction in (_MEAN, _SUM):
        name = "mean" if reduction == _MEAN else "sum"
        result = op(getattr(aten, name).default, result, name=f"{name}_default")
    node.replace_all_uses_with(result)
