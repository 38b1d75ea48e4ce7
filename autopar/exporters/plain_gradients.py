"""The backward operators of autopar in plain torch, for exported training steps; see ``plain_operators.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.exporters.plain_operators import attention_tile, hidden, positions
from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD, plain_backward
from autopar.operators.attention_tile import TILE_BACKWARD
from autopar.operators.experts import EXPERT_OUTER
from autopar.operators.routing import COLUMNS_BACKWARD


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As :mod:`autopar.operators.attention`."""
    return attention_tile(q, k, v, mask, [], None, "j<=i" if is_causal else "", -1, 1, False, scale)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)[:3]


def attention_tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor],
    out: Tensor, logsumexp: Tensor, rank: Tensor | None,
    where: str, step: int, ways: int, mirrored: bool, scale: float | None, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :mod:`autopar.operators.attention_tile`, with all scores at once."""
    rows, columns = positions(q, k, rank, step, ways, mirrored)
    mask = hidden(q, bias, vectors, where, rows, columns, step)
    *grads, change = plain_backward(grad, q, k, v, mask, out, logsumexp, False, scale)
    if bias is None or not bias_grad:
        return grads[0], grads[1], grads[2], q.new_zeros(0)
    if bias.shape[-1] == 1 or step < 0:
        return grads[0], grads[1], grads[2], change.sum_to_size(bias.shape).to(bias.dtype)
    own = change.sum_to_size((*bias.shape[:-1], change.shape[-1]))
    return grads[0], grads[1], grads[2], torch.zeros_like(bias).index_copy(-1, columns, own.to(bias.dtype))


def expert_outer(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    """As :mod:`autopar.operators.experts`: of each expert, all rows but those of others, which are zeros."""
    left, right = (
        x if x.shape[0] == ids.shape[0] else x.repeat_interleave(ids.shape[0] // x.shape[0], 0) for x in (left, right)
    )
    sums = [torch.where((ids == expert).unsqueeze(1), left, 0.0).t() @ right for expert in range(experts)]
    return torch.stack(sums)


def columns_backward(grad: Tensor, dim: int, size: int, start: int, step: int) -> Tensor:
    """As :mod:`autopar.operators.routing`."""
    whole = grad.new_zeros([size if d == dim else length for d, length in enumerate(grad.shape)])
    return whole.index_copy(dim, torch.arange(grad.shape[dim]) * step + start, grad)


GRADIENTS: dict[Any, Callable[..., Any]] = {
    ATTENTION: attention,
    ATTENTION_BACKWARD: attention_backward,
    TILE_BACKWARD: attention_tile_backward,
    EXPERT_OUTER: expert_outer,
    COLUMNS_BACKWARD: columns_backward,
}
