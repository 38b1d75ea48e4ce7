"""Operands at which an operator on rows that were not selected would fail, or have an infinite derivative.

Models select rows so that they are none of those: positive ones before a logarithm, labels that exist. What becomes of
the others is left out in the end; but an infinite derivative times a gradient of zero is nan, and a label of -100 is
refused. So such an operand is replaced first, where the row was not selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

aten = torch.ops.aten

_LOGARITHMS = (aten.log.default, aten.log2.default, aten.log10.default)
_ROOTS = (aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.lgamma.default, aten.digamma.default)
_GROWING = (
    aten.exp.default, aten.exp2.default, aten.expm1.default, aten.sinh.default, aten.cosh.default, aten.tan.default,
)  # fmt: skip
_WITHIN_ONE = (aten.acos.default, aten.asin.default, aten.atanh.default, aten.erfinv.default, aten.log1p.default)
_DIVISIONS = (
    aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default, aten.remainder.Tensor, aten.fmod.Tensor,
    aten.atan2.default, aten.xlogy.Tensor,
)  # fmt: skip

SAFE: Mapping[Any, Mapping[int, float]] = {  # operator -> place of the operand -> a value at which all is finite
    **dict.fromkeys((*_LOGARITHMS, *_ROOTS, aten.pow.Tensor_Scalar), {0: 1}),
    **dict.fromkeys((*_GROWING, *_WITHIN_ONE), {0: 0}),
    **dict.fromkeys(_DIVISIONS, {1: 1}),
    aten.acosh.default: {0: 2},
    aten.logit.default: {0: 0.5},
    aten.pow.Tensor_Tensor: {0: 1, 1: 1},
    aten.pow.Scalar: {1: 0},
    aten.embedding.default: {1: 0},
    aten.gather.default: {2: 0},
    aten.index_select.default: {2: 0},
    aten.one_hot.default: {0: 0},
    aten.cross_entropy_loss.default: {1: 0},
    aten.nll_loss.default: {1: 0},
    aten.nll_loss_nd.default: {1: 0},
    aten.binary_cross_entropy.default: {0: 0.5, 1: 0.5},
}
