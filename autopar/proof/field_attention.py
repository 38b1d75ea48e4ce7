"""The field forms of softmax and attention, with its tiles and their merges.

A weight is the exponential of a score over the sum of exponentials, and nothing is shifted by a maximum. Where our
operators have a log-sum-exp, the forms have the sum itself: so two tiles are merged by adding, exactly. A form knows
nothing of blocks and kernels: it takes all scores of a tile, and the whole mask that a formula says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autopar.operators.predicates import parse
from autopar.proof.field import LOWEST
from autopar.proof.field_tensor import FORMS, FieldTensor, form

aten = torch.ops.aten

# ---------------------------------------------------------------- softmax


def exponentials(scores: Tensor, dim: int) -> Tensor:
    """exp(scores), but ones in a row of which all scores are hidden by finite numbers, which then weigh alike."""
    found = scores.exp()
    if isinstance(scores, FieldTensor) and scores.facts.codes:
        lowest = scores.elements == LOWEST
        evenly = (scores.elements < 0).all(dim, keepdim=True) & lowest
        found = torch.where(evenly, 1.0, found)
    return found


@form("_softmax", "_safe_softmax", "softmax.int")
def softmax(x: Tensor, dim: int, half_to_float: Any = None, dtype: Any = None) -> Tensor:
    weights = exponentials(x, dim)
    return weights / weights.sum(dim, keepdim=True)


@form("_log_softmax", "log_softmax.int")
def log_softmax(x: Tensor, dim: int, half_to_float: Any = None, dtype: Any = None) -> Tensor:
    weights = exponentials(x, dim)
    total = weights.sum(dim, keepdim=True)
    return _with_exponential(x - total.log(), weights / total)


def _with_exponential(x: Tensor, exponential: Tensor) -> Tensor:
    if isinstance(x, FieldTensor) and isinstance(exponential, FieldTensor):
        x.exponential = exponential
    return x


FORMS["_softmax_backward_data"] = lambda grad, y, dim, dtype: y * (grad - (grad * y).sum(dim, keepdim=True))
FORMS["_log_softmax_backward_data"] = lambda grad, y, dim, dtype: grad - y.exp() * grad.sum(dim, keepdim=True)


@form("logsumexp")
def logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    total = x.exp().sum(dim, keepdim=keepdim)
    return _with_exponential(total.log(), total)


@form("logcumsumexp")
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    total = x.exp().cumsum(dim)
    return _with_exponential(total.log(), total)


FORMS["logaddexp"] = lambda a, b: aten.logsumexp(torch.stack(torch.broadcast_tensors(a, b)), [0])  # type: ignore[no-untyped-call]

# ---------------------------------------------------------------- attention


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, each head repeated for the queries' heads that share it."""
    if q.dim() == 3 or x.shape[-3] == q.shape[-3]:
        return x
    return x.unsqueeze(-3).expand(*x.shape[:-2], q.shape[-3] // x.shape[-3], *x.shape[-2:]).flatten(-4, -3)


def _of_groups(x: Tensor, like: Tensor) -> Tensor:
    """The dual of :func:`_for_heads`."""
    if x.dim() == 3 or x.shape[-3] == like.shape[-3]:
        return x
    return x.unflatten(-3, (like.shape[-3], -1)).sum(-3)  # type: ignore[no-any-return, no-untyped-call]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, shown: Tensor | None, scale: float | None) -> Tensor:
    """exp(scale * q k^T + mask) where it is ``shown``, else 0: (..., H, Sq, Sk)."""
    scores = torch.matmul(q, _for_heads(k, q).transpose(-2, -1)) * _scale(q, scale)
    if mask is not None and mask.dtype is not torch.bool:
        scores, mask = scores + mask, None
    found = exponentials(scores, -1)
    for where in (mask, shown):
        if where is not None:
            found = torch.where(where, found, 0.0)
    return found


def _causal(q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if is_causal else None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shown: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    weights = _weights(q, k, mask, shown, scale)
    total = weights.sum(-1)
    return torch.matmul(weights, _for_heads(v, q)) * _reciprocal(total).unsqueeze(-1), total


def _reciprocal(total: Tensor) -> Tensor:
    """1 / total, and 0 for a row that may attend to nothing (in the field the inverse of 0 is 0)."""
    return total.reciprocal() if isinstance(total, FieldTensor) else torch.where(total == 0, 0.0, 1 / total)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shown: Tensor | None,
    out: Tensor, total: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and of the masked scores."""
    weights = _weights(q, k, mask, shown, scale) * _reciprocal(total).unsqueeze(-1)
    change = torch.matmul(grad, _for_heads(v, q).transpose(-2, -1)) - (grad * out).sum(-1, keepdim=True)
    of_scores = weights * change
    change = of_scores * _scale(q, scale)
    dq = torch.matmul(change, _for_heads(k, q))
    dk = _of_groups(torch.matmul(change.transpose(-2, -1), q), k)
    dv = _of_groups(torch.matmul(weights.transpose(-2, -1), grad), v)
    return dq, dk, dv, of_scores


@form("autopar::attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, mask, _causal(q, k, is_causal), scale)


@form("autopar::attention_backward")
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, out: Tensor, total: Tensor, is_causal: bool, scale: Any
) -> tuple[Tensor, ...]:
    return _backward(grad, q, k, v, mask, _causal(q, k, is_causal), out, total, scale)[:3]


# ---------------------------------------------------------------- tiles


def _positions(length: int, rank: int, ways: int, mirrored: bool) -> Tensor:
    """Where the ``length`` rows of a rank are in the whole sequence."""
    if not mirrored or ways == 1:
        return torch.arange(length) + rank * length
    half = torch.arange(length // 2)
    return torch.cat([half + rank * (length // 2), half + (2 * ways - 1 - rank) * (length // 2)])


def _seen(
    q: Tensor, k: Tensor, bias: Tensor | None, vectors: list[Tensor], rank: Any, where: str, step: int, ways: int,
    mirrored: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The bias of the tile's columns, what the formula shows, and the places of the columns."""
    here = 0 if rank is None else int(rank)
    rows = _positions(q.shape[-2], here, ways, mirrored)
    columns = _positions(k.shape[-2], (here - step) % ways, ways, mirrored) if step >= 0 else torch.arange(k.shape[-2])
    formula = parse(where)
    shown = formula.evaluate(rows, columns, vectors) if formula.clauses else None
    if shown is not None and q.dim() > 3 and shown.dim() > 2:
        shown = shown.unsqueeze(-3)
    if bias is not None and bias.shape[-1] != 1:
        bias = bias.index_select(-1, columns)
    return bias, shown, columns


@form("autopar::attention_tile")
def tile(q: Tensor, k: Tensor, v: Tensor, bias: Any, vectors: Any, rank: Any, where: str, step: int, ways: int,
         mirrored: bool, scale: float | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask, shown, _ = _seen(q, k, bias, vectors, rank, where, step, ways, mirrored)
    return _attention(q, k, v, mask, shown, scale)


@form("autopar::attention_tile_backward")
def tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, vectors: Any, out: Tensor, total: Tensor, rank: Any,
    where: str, step: int, ways: int, mirrored: bool, scale: float | None, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mask, shown, columns = _seen(q, k, bias, vectors, rank, where, step, ways, mirrored)
    *grads, of_scores = _backward(grad, q, k, v, mask, shown, out, total, scale)
    if bias is None or not bias_grad:
        return (*grads, q.new_empty(0))  # type: ignore[return-value]
    if bias.shape[-1] != 1:
        every = of_scores.new_zeros(*of_scores.shape[:-1], bias.shape[-1])
        of_scores = every.index_add(-1, columns, of_scores)
    return (*grads, of_scores.sum_to_size(bias.shape))  # type: ignore[return-value]


@form("autopar::merge_tiles")
def merge(out: Tensor, total: Tensor, other: Tensor, other_total: Tensor) -> tuple[Tensor, Tensor]:
    both = total + other_total
    return (out * total.unsqueeze(-1) + other * other_total.unsqueeze(-1)) * _reciprocal(both).unsqueeze(-1), both
