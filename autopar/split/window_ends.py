"""The ends of windows: sums, means and losses of some of the positions, written as ones of all positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar import operators
from autopar.ir.node import Value, value, values
from autopar.rules.losses import ELEMENTWISE, MEAN, NONE
from autopar.split.windows import Window, Writer

aten = torch.ops.aten

SUMS = (aten.sum.default, aten.sum.dim_IntList)
MEANS = (aten.mean.default, aten.mean.dim)
LABELLED = {  # losses: the number of the argument that says which label counts for nothing
    operators.cross_entropy_sums: 3,
    aten.cross_entropy_loss.default: 4,
    aten.nll_loss_nd.default: 4,
}


def with_operands(node: fx.Node, found: list[Window | fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    following = iter([each.node if isinstance(each, Window) else each for each in found])
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: next(following))
    return args, kwargs


def combined(node: fx.Node, found: list[Window | fx.Node], base: Window, writer: Writer) -> fx.Node | None:
    """A sum, a mean or a loss of a window, of all positions; None for another operator."""
    if node.target in (*SUMS, *MEANS):
        return _summed(node, found[0], base, writer)
    if node.target in LABELLED:
        return _labelled(node, found, writer)
    if node.target in ELEMENTWISE:
        return _averaged(node, found, base, writer)
    return None


def _summed(node: fx.Node, source: Window | fx.Node, base: Window, writer: Writer) -> fx.Node | None:
    assert isinstance(source, Window)
    filled = writer.filled_beside(source, 0)
    if filled is None:
        return None
    if node.target in MEANS:
        filled = _for_mean(filled, base, writer)
    return writer.op(node.target, filled, *node.args[1:], like=node, **node.kwargs)  # type: ignore[arg-type]


def _for_mean(filled: fx.Node, base: Window, writer: Writer) -> fx.Node:
    """What has the mean of a window as its mean over all positions, zeros among them."""
    return writer.op(aten.mul.Tensor, filled, base.total / base.length, like=filled)


def _labelled(node: fx.Node, found: list[Window | fx.Node], writer: Writer) -> fx.Node | None:
    target = found[1]
    if not isinstance(target, Window) or value(target.node).dtype.is_floating_point:
        return None
    place = LABELLED[node.target]
    ignored = node.args[place] if len(node.args) > place else node.kwargs.get("ignore_index", -100)
    assert isinstance(ignored, int)
    filled = writer.filled_beside(target, ignored)
    if filled is None:
        return None
    args, kwargs = with_operands(node, [found[0], filled, *found[2:]])
    return writer.op(node.target, *args, like=values(node), **kwargs)


def _averaged(node: fx.Node, found: list[Window | fx.Node], base: Window, writer: Writer) -> fx.Node | None:
    """A loss of each element, and then its sum or mean."""
    place = ELEMENTWISE[node.target]
    reduction = node.args[place] if len(node.args) > place else node.kwargs.get("reduction", MEAN)
    args, kwargs = with_operands(node, found)
    wide = max((each for each in found if isinstance(each, Window)), key=lambda w: math.prod(value(w.node).shape))
    if any(math.prod(value(each).shape) > 1 for each in found if isinstance(each, fx.Node)):
        return None
    kwargs = {name: setting for name, setting in kwargs.items() if name != "reduction"}
    defaults = [argument.default_value for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = (*args[:place], *defaults[len(args) : place], NONE, *args[place + 1 :])
    kind = Value(value(node).dtype, value(wide.node).layout, value(node).requires_grad)
    each = writer.op(node.target, *args, like=kind, **kwargs)
    filled = writer.filled_beside(replace(wide, node=each), 0)
    if filled is None:
        return None
    if reduction == MEAN:
        filled = _for_mean(filled, base, writer)
    return writer.op((aten.mean if reduction == MEAN else aten.sum).default, filled, like=node)
