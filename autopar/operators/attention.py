"""Attention as one operator with its own backward, so that graphs do not depend on the device they were traced on.

    autopar::attention(q, k, v, mask, is_causal, scale) -> (out, logsumexp)
    autopar::attention_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale) -> (dq, dk, dv)

    q (..., H, Sq, D)   k (..., Hkv, Sk, D)   v (..., Hkv, Sk, Dv)   Hkv divides H   out (..., H, Sq, Dv)
    mask bool (True takes part) or float (added), broadcastable to (..., H, Sq, Sk); causal is aligned top left
    logsumexp (..., H, Sq), of the scaled and masked scores, natural logarithm

The kernels call torch's fused ones where those apply (only this file knows their names) and a plain computation
elsewhere. A row that may attend to nothing gives zeros, as in torch, and the log-sum-exp -inf, on every kernel (torch's
own write 0 or inf). Backward also takes ``out`` and ``logsumexp`` of an attention to more keys than these. With
dropout, or with a mask that needs a gradient, ``attention_by_parts`` is used instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopar.operators.attention_operands import (
    HALVES,
    accumulated,
    alike,
    bias_of,
    empty,
    four_dims,
    grouped,
    heads_inside,
    is_later,
    like_operand,
    rows_of,
    scale_of,
    summed,
    widened,
)
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
_FLASH: Any = torch._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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
    found: tuple[Tensor, Tensor] = ATTENTION(*alike(q, k, v), attn_mask, is_causal, scale)
    return found[0]


def attention_by_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention from matmul, softmax and matmul, differentiated by torch (the mask too)."""
    if q.dim() > 3:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale_of(q, scale)
    allowed = None
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype is torch.bool else scores + mask
        allowed = (scores > -math.inf).any(-1, keepdim=True)
    if is_causal:
        scores = scores.masked_fill(is_later(q, k), -math.inf)
    if allowed is not None:  # a row without any score: softmax gives nan, torch's attention zero
        scores = torch.where(allowed, scores, 0.0)
    weights = torch.softmax(scores, -1)
    if allowed is not None:
        weights = torch.where(allowed, weights, 0.0)
    if dropout_p > 0.0:
        weights = functional.dropout(weights, dropout_p)
    return torch.matmul(weights, v)


# ---------------------------------------------------------------- shapes and derivative


@torch.library.register_fake("autopar::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    return empty(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=accumulated(q.dtype))


@torch.library.register_fake("autopar::attention_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty(q, q.shape[-1]), empty(k, k.shape[-1]), empty(v, v.shape[-1])


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() < 3 or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.dim() != k.dim():
        raise ValueError(f"attention: {_shapes(q, k, v)} do not fit together")
    if q.dim() > 3 and (q.shape[:-3] != k.shape[:-3] or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"attention: {_shapes(q, k, v)}: the heads of q must be a multiple of those of k and v")
    if q.dim() == 3 and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {_shapes(q, k, v)}: the batches differ")
    if mask is not None:
        scores = (*q.shape[:-1], k.shape[-2])
        if torch.broadcast_shapes(mask.shape, scores) != scores:  # type: ignore[no-untyped-call]
            raise ValueError(f"attention: mask {list(mask.shape)} does not broadcast to the scores {list(scores)}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


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


def _without_keys(logsumexp: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, Sq), -inf in the rows that ``bias`` keeps from every key, whatever the kernel wrote there."""
    return logsumexp if bias is None else logsumexp.masked_fill(bias.amax(-1) == -math.inf, -math.inf)


def _finite_weights(logsumexp: Tensor) -> Tensor:
    """(B, H, Sq) for the kernels of backward: exp(score - inf) is 0, but exp(-inf - -inf) is nan."""
    rows = rows_of(logsumexp)
    return rows.masked_fill(rows == -math.inf, math.inf)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    keys, values = (grouped(four_dims(x), q, k) for x in (k, v))
    scores = _scores(q, keys, mask, is_causal, scale)
    logsumexp = torch.logsumexp(scores, -1)
    out = torch.matmul(_weights(scores, logsumexp), values.to(scores.dtype))
    return like_operand(out.to(q.dtype), q), logsumexp.reshape(q.shape[:-1])


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)[:3]


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, and of the masked scores (..., H, Sq, Sk)."""
    keys, values = (grouped(four_dims(x), q, k) for x in (k, v))
    scores = _scores(q, keys, mask, is_causal, scale)
    weights = _weights(scores, rows_of(logsumexp))
    wide, out = four_dims(grad).to(scores.dtype), four_dims(out)
    change = torch.matmul(wide, values.to(scores.dtype).transpose(-2, -1)) - (wide * out).sum(-1, keepdim=True)
    change = change * weights
    of_scores, change = change.reshape(*q.shape[:-1], k.shape[-2]), change * scale_of(q, scale)
    dq = torch.matmul(change, keys.to(scores.dtype))
    dk = torch.matmul(change.transpose(-2, -1), four_dims(q).to(scores.dtype))
    dv = torch.matmul(weights.transpose(-2, -1), wide)
    dk, dv = (summed(x, q, k) for x in (dk, dv))
    return like_operand(dq.to(q.dtype), q), like_operand(dk.to(k.dtype), k), like_operand(dv.to(v.dtype), v), of_scores


def _scores(q: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    dtype = accumulated(q.dtype)
    scores = torch.matmul(four_dims(q).to(dtype) * scale_of(q, scale), keys.to(dtype).transpose(-2, -1))
    bias = bias_of(mask, q, keys, is_causal)
    if bias is not None:
        return scores + bias
    return scores.masked_fill(is_later(q, keys), -math.inf) if is_causal else scores


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """exp(scores - logsumexp), zeros in rows that may attend to nothing."""
    return torch.where(scores == -math.inf, 0.0, torch.exp(scores - logsumexp.unsqueeze(-1)))


def _fits_cpu(q: Tensor, k: Tensor) -> bool:
    return q.numel() > 0 and k.numel() > 0 and q.dtype in (torch.float32, torch.float64, *HALVES)


def _is_direct(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's CPU kernels take, and give, these operands as they are: without a mask every row has a key, so
    no log-sum-exp is -inf."""
    if mask is not None or q.dim() != 4 or q.shape[-1] != v.shape[-1] or not _fits_cpu(q, k):
        return False
    return q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def _laid_out(x: Tensor) -> Tensor:
    """:func:`heads_inside` of four dims, which the kernel's results mostly are."""
    _, heads, length, width = x.shape
    return x if x.stride() == (length * heads * width, width, heads * width, 1) else heads_inside(x)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    if _is_direct(q, k, v, mask):
        out, logsumexp = _FLASH(q, k, v, 0.0, is_causal, scale=scale)
        return _laid_out(out), logsumexp.contiguous()
    if not _fits_cpu(q, k):
        return _plain(q, k, v, mask, is_causal, scale)
    width, bias = max(q.shape[-1], v.shape[-1]), bias_of(mask, q, k, is_causal)
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        *(widened(four_dims(x), width) for x in (q, k, v)),
        is_causal=is_causal and bias is None,
        attn_mask=bias,
        scale=scale_of(q, scale),
    )
    logsumexp = _without_keys(logsumexp, bias)
    return like_operand(out[..., : v.shape[-1]], q), logsumexp.reshape(q.shape[:-1]).contiguous()


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _is_direct(q, k, v, mask) and grad.stride(-1) == out.stride(-1) == 1:
        dq, dk, dv = _FLASH_BACKWARD(grad, q, k, v, out, logsumexp, 0.0, is_causal, scale=scale)
        return _laid_out(dq), _laid_out(dk), _laid_out(dv)
    if not _fits_cpu(q, k):
        return _plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    width, bias = max(q.shape[-1], v.shape[-1]), bias_of(mask, q, k, is_causal)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(widened(four_dims(x), width) for x in (grad, q, k, v, out)),
        _finite_weights(logsumexp),
        0.0,
        is_causal and bias is None,
        attn_mask=bias,
        scale=scale_of(q, scale),
    )
    dq, dk, dv = (like_operand(x[..., : model.shape[-1]], model) for x, model in zip(grads, (q, k, v)))
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
    kernel, factor = _cuda_kernel(q, k, v, mask, is_causal), scale_of(q, scale)
    if kernel == "plain":
        return _plain(q, k, v, mask, is_causal, scale)
    if kernel == "flash":
        found = aten._scaled_dot_product_flash_attention(
            four_dims(q), four_dims(k), four_dims(v), 0.0, is_causal, scale=factor
        )
        return like_operand(found[0], q), found[1].reshape(q.shape[:-1])
    inputs, bias = _efficient_inputs(q, k, v), _aligned_bias(bias_of(mask, q, k, is_causal), q, k)
    out, logsumexp, _, _ = aten._scaled_dot_product_efficient_attention(
        *inputs, bias, True, 0.0, is_causal and bias is None, scale=factor
    )  # its logsumexp is padded along the rows
    logsumexp = _without_keys(logsumexp[..., : q.shape[-2]], bias)
    return like_operand(out[..., : v.shape[-1]], q), logsumexp.reshape(q.shape[:-1]).contiguous()


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel, factor = _cuda_kernel(q, k, v, mask, is_causal), scale_of(q, scale)
    if kernel == "plain":
        return _plain_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    rows = _finite_weights(logsumexp).contiguous()
    if kernel == "flash":
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is not used
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            four_dims(grad), four_dims(q), four_dims(k), four_dims(v), four_dims(out), rows,
            None, None, q.shape[-2], k.shape[-2], 0.0, is_causal, nothing, nothing[0], scale=factor,
        )  # fmt: skip
        return like_operand(dq, q), like_operand(dk, k), like_operand(dv, v)
    inputs, bias = _efficient_inputs(q, k, v), _aligned_bias(bias_of(mask, q, k, is_causal), q, k)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    rows = functional.pad(rows, (0, -rows.shape[-1] % 32), value=math.inf)
    width = inputs[2].shape[-1]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        widened(four_dims(grad), width), *inputs, bias, widened(four_dims(out), width), rows, nothing, nothing,
        0.0, [True, True, True, False], is_causal and bias is None, scale=factor,
    )  # fmt: skip
    dk, dv = (summed(x, q, k) for x in (dk, dv))
    return (
        like_operand(dq[..., : q.shape[-1]], q),
        like_operand(dk[..., : k.shape[-1]], k),
        like_operand(dv[..., : v.shape[-1]], v),
    )


def _efficient_inputs(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """(B, H, S, D) with equal heads and widths that are multiples of 8."""
    parts = (four_dims(q), grouped(four_dims(k), q, k), grouped(four_dims(v), q, k))
    return [widened(x, -(-x.shape[-1] // 8) * 8) for x in parts]


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

# ---------------------------------------------------------------- without the dispatcher


def _is_plain(*operands: Tensor) -> bool:
    """Whether nobody watches what is called, and these are ordinary tensors on a CPU, which nobody wraps."""
    return not torch._C._len_torch_dispatch_stack() and all(type(x) is Tensor and x.is_cpu for x in operands)


def attention_here(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As :data:`ATTENTION`, of operands whose shapes were seen to fit: 10 us sooner where torch's kernel takes them."""
    if _is_direct(q, k, v, mask) and _is_plain(q, k, v):
        out, logsumexp = _FLASH(q, k, v, 0.0, is_causal, scale=scale)
        return _laid_out(out), logsumexp.contiguous()
    found: tuple[Tensor, Tensor] = ATTENTION(q, k, v, mask, is_causal, scale)
    return found


def attention_backward_here(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, logsumexp: Tensor, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :data:`ATTENTION_BACKWARD`; see :func:`attention_here`."""
    if _is_plain(grad, q, k, v):
        return _cpu_backward(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    found: tuple[Tensor, Tensor, Tensor]
    found = ATTENTION_BACKWARD(grad, q, k, v, mask, out, logsumexp, is_causal, scale)
    return found


HERE: dict[Any, Any] = {ATTENTION: attention_here, ATTENTION_BACKWARD: attention_backward_here}
