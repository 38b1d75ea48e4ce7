"""The divisor of a mean over labels, written out as operators of the labels alone."""

from __future__ import annotations

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value

aten = torch.ops.aten


def label_count(op: Builder, target: fx.Node, weight: fx.Node | None, ignore_index: int, dtype: torch.dtype) -> fx.Node:
    """The number of class numbers in ``target`` that count, or the sum of the weights of their classes."""
    counted = op(aten.ne.Scalar, target, ignore_index)
    if weight is None:
        return op.cast(op(aten.sum.default, counted), dtype)
    classes = op(aten.clamp.default, target, 0, value(weight).shape[0] - 1)
    weights = op(aten.mul.Tensor, op(aten.index.Tensor, weight, [classes]), op.cast(counted, value(weight).dtype))
    return op.cast(op(aten.sum.default, weights), dtype)
