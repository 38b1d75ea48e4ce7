"""Attention as one operator with its own backward, so that graphs do not depend on the device they were traced on.

    autopar::attention(q, k, v, mask, is_causal, scale) -> (out, logsumexp)
    autopar::attention_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale) -> (dq, dk, dv)

    q (..., H, Sq, D)   k (..., Hkv, Sk, D)   v (..., Hkv, Sk, Dv)   Hkv divides H   out (..., H, Sq, Dv)
    mask bool (True takes part) or float (added), broadcastable to (..., H, Sq, Sk); causal is aligned top left
    logsumexp (..., H, Sq), of the scaled and masked scores, natural logarithm

The kernels call torch's fused ones where those apply (only this file knows their names) and a plain computation
elsewhere. A row that may attend to nothing gives zeros, as in torch. With dropout, or with a mask that needs a
gradient, ``attention_by_parts`` is used instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopar.operators.registry import library

aten = torch.ops.aten

_SCHEMAS = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> (Tensor, Tensor)",
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor logsumexp, "
    "bool is_causal, float? scale) -> (Tensor, Tensor, Tensor)",
)
_LIBRARY = library(*_SCHEMAS)
ATTENTION = torch.ops.autopar.attention.default
ATTENTION_BACKWARD = torch.ops.autopar.attention_backward.default

HALVES = (torch.float16, torch.bfloat16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, by the operators of this file."""
    if dropout_p > 0.0 or (attn_mask is not None and attn_mask.requires_grad):
        return attention_by_parts(q, k, v, attn_mask, dropout_p, is_causal, scale)
    leading = torch.broadcast_shapes(*(x.shape[: -3 if q.dim() > 3 else -2] for x in (q, k, v)))  # type: ignore[no-untyped-call]
    q, k, v = (_with_leading(x, leading) for x in (q, k, v))
    if q.dim() > 3 and k.shape[-3] != v.shape[-3]:
        heads = max(k.shape[-3], v.shape[-3])
        k, v = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (k, v))
    found: tuple[Tensor, Tensor] = ATTENTION(q, k, v, attn_mask, is_causal, scale)
    return found[0]


def attention_by_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention from matmul, softmax and matmul, differentiated by torch (the mask too)."""
    if q.dim() > 3:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)) * _scale(q, scale)
    allowed = None
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype is torch.bool else scores + mask
        allowed = (scores > -math.inf).any(-1, keepdim=True)
    if is_causal:
        scores = scores.masked_fill(_later(q, k), -math.inf)
    if allowed is not None:  # a row without any score: softmax gives nan, torch's attention zero
        scores = torch.where(allowed, scores, 0.0)
    weights = torch.softmax(scores, -1)
    if allowed is not None:
        weights = torch.where(allowed, weights, 0.0)
    if dropout_p > 0.0:
        weights = functional.dropout(weights, dropout_p)
    return torch.matmul(weights, v)


def _with_leading(x: Tensor, leading: torch.Size) -> Tensor:
    kept = x.shape[x.dim() - (3 if x.dim() > 3 else 2) :]
    return x if x.shape == (*leading, *kept) else x.expand(*leading, *kept)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _later(q: Tensor, k: Tensor) -> Tensor:
    """(Sq, Sk), True where the key comes after the query."""
    rows, columns = torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device)
    return columns[None, :] > rows[:, None]


# ---------------------------------------------------------------- shapes and derivative


def _heads_inside(x: Tensor) -> Tensor:
    """The same tensor, laid out as (..., S, H, D): fused kernels write this, and merging the heads is free then."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 3 else x.contiguous()


def _empty(like: Tensor, width: int) -> Tensor:
    *leading, heads, length, _ = (1, *like.shape) if like.dim() == 3 else like.shape
    if like.dim() == 3:
        return like.new_empty((heads, length, width))
    return like.new_empty((*leading, length, heads, width)).transpose(-3, -2)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


@torch.library.register_fake("autopar::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    return _empty(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_accumulated(q.dtype))


@torch.library.register_fake("autopar::attention_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, q.shape[-1]), _empty(k, k.shape[-1]), _empty(v, v.shape[-1])


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() < 3 or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.dim() != k.dim():
        raise ValueError(f"attention: {shapes} do not fit together")
    if q.dim() > 3 and (q.shape[:-3] != k.shape[:-3] or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"attention: {shapes}: the heads of q must be a multiple of those of k and v")
    if q.dim() == 3 and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {shapes}: the batches differ")
    if mask is not None:
        scores = (*q.shape[:-1], k.shape[-2])
        if torch.broadcast_shapes(mask.shape, scores) != scores:  # type: ignore[no-untyped-call]
            raise ValueError(f"attention: mask {list(mask.shape)} does not broadcast to the scores {list(scores)}")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, mask, out, logsumexp = ctx.saved_tensors
    dq, dk, dv = ATTENTION_BACKWARD(grad, q, k, v, mask, out, logsumexp, ctx.is_causal, ctx.scale)
    return dq, dk, dv, None, None, None


torch.library.register_autograd("autopar::attention", _derivative, setup_context=_remember, lib=_LIBRARY)

# ---------------------------------------------------------------- kernels


def _four(x: Tensor) -> Tensor:
    """(B, H, S, D) with the last dim dense, whatever the leading dims."""
    x = x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor, model: Tensor) -> Tensor:
    """The inverse of :func:`_four` for a result that belongs to ``model``."""
    return x.squeeze(1).contiguous() if model.dim() == 3 else _heads_inside(x).unflatten(0, model.shape[:-3])  # type: ignore[no-untyped-call]


def _rows(logsumexp: Tensor) -> Tensor:
    """(B, H, Sq)."""
    return logsumexp.unsqueeze(1) if logsumexp.dim() == 2 else logsumexp.flatten(0, -3)


def _widened(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros after its last dim; they change no score, and no output that is kept."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def _bias(mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
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
        mask = mask.masked_fill(_later(q, k), -math.inf)
    return mask.to(q.dtype)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    keys, values = (_grouped(_four(x), q, k) for x in (k, v))
    scores = _scores(q, keys, mask, is_causal, scale)
    logsumexp = torch.logsumexp(scores, -1)
    out = torch.matmul(_weights(scores, logsumexp), values.to(scores.dtype))
    return _like(out.to(q.dtype), q), logsumexp.reshape(q.shape[:-1])


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, values = (_grouped(_four(x), q, k) for x in (k, v))
    scores = _scores(q, keys, mask, is_causal, scale)
    weights = _weights(scores, _rows(logsumexp))
    wide, out = _four(grad).to(scores.dtype), _four(out)
    change = torch.matmul(wide, values.to(scores.dtype).transpose(-2, -1)) - (wide * out).sum(-1, keepdim=True)
    change = change * weights * _scale(q, scale)
    dq = torch.matmul(change, keys.to(scores.dtype))
    dk = torch.matmul(change.transpose(-2, -1), _four(q).to(scores.dtype))
    dv = torch.matmul(weights.transpose(-2, -1), wide)
    dk, dv = (_summed(x, q, k) for x in (dk, dv))
    return _like(dq.to(q.dtype), q), _like(dk.to(k.dtype), k), _like(dv.to(v.dtype), v)


def _grouped(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Keys or values (B, Hkv, Sk, D), each head repeated for the query heads that share it."""
    return x if q.dim() == 3 or q.shape[-3] == k.shape[-3] else x.repeat_interleave(q.shape[-3] // k.shape[-3], 1)


def _summed(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The dual of :func:`_grouped`."""
    return x if q.dim() == 3 or q.shape[-3] == k.shape[-3] else x.unflatten(1, (k.shape[-3], -1)).sum(2)  # type: ignore[no-untyped-call]


def _scores(q: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    dtype = _accumulated(q.dtype)
    scores = torch.matmul(_four(q).to(dtype) * _scale(q, scale), keys.to(dtype).transpose(-2, -1))
    bias = _bias(mask, q, keys, is_causal)
    if bias is not None:
        return scores + bias
    return scores.masked_fill(_later(q, keys), -math.inf) if is_causal else scores


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """exp(scores - logsumexp), zeros in rows that may attend to nothing."""
    return torch.where(scores == -math.inf, 0.0, torch.exp(scores - logsumexp.unsqueeze(-1)))


def _fits_cpu(q: Tensor, k: Tensor) -> bool:
    return q.numel() > 0 and k.numel() > 0 and q.dtype in (torch.float32, torch.float64, *HALVES)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    if not _fits_cpu(q, k):
        return _plain(q, k, v, mask, is_causal, scale)
    width, bias = max(q.shape[-1], v.shape[-1]), _bias(mask, q, k, is_causal)
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        *(_widened(_four(x), width) for x in (q, k, v)),
        is_causal=is_causal and bias is None,
        attn_mask=bias,
        scale=_scale(q, scale),
    )
    return _like(out[..., : v.shape[-1]], q), logsumexp.reshape(q.shape[:-1]).contiguous()


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _fits_cpu(q, k):
        return _plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    width, bias = max(q.shape[-1], v.shape[-1]), _bias(mask, q, k, is_causal)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_widened(_four(x), width) for x in (grad, q, k, v, out)),
        _rows(logsumexp),
        0.0,
        is_causal and bias is None,
        attn_mask=bias,
        scale=_scale(q, scale),
    )
    dq, dk, dv = (_like(x[..., : model.shape[-1]], model) for x, model in zip(grads, (q, k, v)))
    return dq, dk, dv


def _cuda_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """The kernel of torch that takes these operands: flash is the fastest and accepts the fewest."""
    if q.numel() == 0 or k.numel() == 0 or q.dtype not in (torch.float32, *HALVES):
        return "plain"
    same_width, aligned = q.shape[-1] == v.shape[-1] <= 256, not is_causal or q.shape[-2] == k.shape[-2]
    if q.dtype in HALVES and mask is None and same_width and q.shape[-1] % 8 == 0 and aligned:
        return "flash"
    return "efficient"


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    kernel, factor = _cuda_kernel(q, k, v, mask, is_causal), _scale(q, scale)
    if kernel == "plain":
        return _plain(q, k, v, mask, is_causal, scale)
    if kernel == "flash":
        found = aten._scaled_dot_product_flash_attention(_four(q), _four(k), _four(v), 0.0, is_causal, scale=factor)
        return _like(found[0], q), found[1].reshape(q.shape[:-1])
    inputs, bias = _efficient_inputs(q, k, v), _aligned_bias(_bias(mask, q, k, is_causal), q, k)
    out, logsumexp, _, _ = aten._scaled_dot_product_efficient_attention(
        *inputs, bias, True, 0.0, is_causal and bias is None, scale=factor
    )  # its logsumexp is padded along the rows
    return _like(out[..., : v.shape[-1]], q), logsumexp[..., : q.shape[-2]].reshape(q.shape[:-1]).contiguous()


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel, factor = _cuda_kernel(q, k, v, mask, is_causal), _scale(q, scale)
    if kernel == "plain":
        return _plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    rows = _rows(logsumexp).contiguous()
    if kernel == "flash":
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is not used
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            _four(grad), _four(q), _four(k), _four(v), _four(out), rows,
            None, None, q.shape[-2], k.shape[-2], 0.0, is_causal, nothing, nothing[0], scale=factor,
        )  # fmt: skip
        return _like(dq, q), _like(dk, k), _like(dv, v)
    inputs, bias = _efficient_inputs(q, k, v), _aligned_bias(_bias(mask, q, k, is_causal), q, k)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    rows = functional.pad(rows, (0, -rows.shape[-1] % 32), value=math.inf)
    width = inputs[2].shape[-1]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        _widened(_four(grad), width), *inputs, bias, _widened(_four(out), width), rows, nothing, nothing,
        0.0, [True, True, True, False], is_causal and bias is None, scale=factor,
    )  # fmt: skip
    dk, dv = (_summed(x, q, k) for x in (dk, dv))
    return _like(dq[..., : q.shape[-1]], q), _like(dk[..., : k.shape[-1]], k), _like(dv[..., : v.shape[-1]], v)


def _efficient_inputs(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """(B, H, S, D) with equal heads and widths that are multiples of 8."""
    parts = (_four(q), _grouped(_four(k), q, k), _grouped(_four(v), q, k))
    return [_widened(x, -(-x.shape[-1] // 8) * 8) for x in parts]


def _aligned_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias expanded to all scores, its rows starting at multiples of 8 elements."""
    if bias is None:
        return None
    columns = k.shape[-2]
    bias = functional.pad(bias.expand(*bias.shape[:-1], columns), (0, -columns % 8))[..., :columns]
    shape = (q.shape[0], 1, q.shape[-2]) if q.dim() == 3 else (math.prod(q.shape[:-3]), *q.shape[-3:-1])
    return bias.expand(*shape, columns)


KERNELS = {
    "CPU": (_cpu, _cpu_backward),
    "CUDA": (_cuda, _cuda_backward),
    "CompositeExplicitAutograd": (_plain, _plain_backward),  # any other device
}
for _device, (_forward, _backward) in KERNELS.items():
    _LIBRARY.impl("attention", _forward, _device)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("attention_backward", _backward, _device)  # type: ignore[no-untyped-call]
