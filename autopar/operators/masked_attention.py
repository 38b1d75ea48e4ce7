"""Attention under a formula over positions: what stands in a program where a mask of (queries, keys) stood."""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.operators.attention_operands import alike
from autopar.operators.attention_tile import TILE
from autopar.operators.registry import operator

aten = torch.ops.aten


@operator
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    vectors: list[Tensor],
    where: str,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + bias, where the formula holds) v``, rows that may attend to nothing are zeros.

    q (..., H, Sq, D), k (..., Hkv, Sk, D), v (..., Hkv, Sk, Dv), Hkv divides H; bias, vectors and ``where`` are those
    of :mod:`autopar.operators.attention_tile`. No tensor of Sq x Sk elements is made, in forward or in backward; a
    gradient of the bias has the bias's shape.
    """
    q, k, v = alike(q, k, v)
    found: tuple[Tensor, Tensor] = TILE(q, k, v, bias, vectors, None, where, 0, 1, False, scale)
    return found[0]


ATTENTIONS = frozenset({aten.scaled_dot_product_attention.default, masked_attention})  # what a program may hold
