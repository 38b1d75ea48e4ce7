"""The operands of attention in the forms that kernels take: four dims, equal widths and heads, a bias for a mask.

q (..., H, Sq, D)   k (..., Hkv, Sk, D)   v (..., Hkv, Sk, Dv)   Hkv divides H; or q (B, Sq, D) without heads
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

HALVES = (torch.float16, torch.bfloat16)


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with equal leading dims, and as many heads of keys as of values."""
    leading = torch.broadcast_shapes(*(x.shape[: -3 if q.dim() > 3 else -2] for x in (q, k, v)))  # type: ignore[no-untyped-call]
    q, k, v = (_with_leading(x, leading) for x in (q, k, v))
    if q.dim() > 3 and k.shape[-3] != v.shape[-3]:
        heads = max(k.shape[-3], v.shape[-3])
        k, v = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (k, v))
    return q, k, v


def _with_leading(x: Tensor, leading: torch.Size) -> Tensor:
    kept = x.shape[x.dim() - (3 if x.dim() > 3 else 2) :]
    return x if x.shape == (*leading, *kept) else x.expand(*leading, *kept)


def scale_of(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def is_later(q: Tensor, k: Tensor) -> Tensor:
    """(Sq, Sk), True where the key comes after the query."""
    rows, columns = torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device)
    return columns[None, :] > rows[:, None]


def heads_inside(x: Tensor) -> Tensor:
    """The same tensor, laid out as (..., S, H, D): fused kernels write this, and merging the heads is free then."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 3 else x.contiguous()


def empty(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """A result (..., H, S, width) for an operand ``like`` (..., H, S, any), laid out as the kernels lay theirs out."""
    *leading, heads, length, _ = (1, *like.shape) if like.dim() == 3 else like.shape
    if like.dim() == 3:
        return like.new_empty((heads, length, width), dtype=dtype)
    return like.new_empty((*leading, length, heads, width), dtype=dtype).transpose(-3, -2)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over scores, and of their logarithm."""
    return torch.float32 if dtype in HALVES else dtype


def four_dims(x: Tensor) -> Tensor:
    """(B, H, S, D) with the last dim dense, whatever the leading dims."""
    x = x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)
    return x if x.stride(-1) == 1 else x.contiguous()


def like_operand(x: Tensor, model: Tensor) -> Tensor:
    """The inverse of :func:`four_dims` for a result that belongs to ``model``."""
    return x.squeeze(1).contiguous() if model.dim() == 3 else heads_inside(x).unflatten(0, model.shape[:-3])  # type: ignore[no-untyped-call]


def rows_of(logsumexp: Tensor) -> Tensor:
    """(B, H, Sq)."""
    return logsumexp.unsqueeze(1) if logsumexp.dim() == 2 else logsumexp.flatten(0, -3)


def widened(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros after its last dim; they change no score, and no output that is kept."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def bias_of(mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
    """The bias of the scores, (B or 1, H or 1, Sq or 1, Sk or 1) in q's dtype; causal is merged into a mask."""
    if mask is None:
        return None
    mask = mask[(None,) * (q.dim() - mask.dim())]
    if q.dim() == 3:
        mask = mask.unsqueeze(1)
    elif q.dim() > 4:
        mask = mask.expand(*q.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -math.inf)
    if is_causal:
        mask = mask.masked_fill(is_later(q, k), -math.inf)
    return mask.to(q.dtype)


def grouped(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Keys or values (B, Hkv, Sk, D), each head repeated for the query heads that share it."""
    return x if q.dim() == 3 or q.shape[-3] == k.shape[-3] else x.repeat_interleave(q.shape[-3] // k.shape[-3], 1)


def summed(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The dual of :func:`grouped`."""
    return x if q.dim() == 3 or q.shape[-3] == k.shape[-3] else x.unflatten(1, (k.shape[-3], -1)).sum(2)  # type: ignore[no-untyped-call]
