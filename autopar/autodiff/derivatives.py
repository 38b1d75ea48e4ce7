"""Derivatives of our own for some operators, so that graphs stay short and suit every device.

linear     stays one operator in forward (torch decomposes it into t, view, mm, view); backward is two matrix products
attention  our operator, which is the same on every device (:mod:`autopar.operators.attention`)
copy       the functional form of ``copy_``, for which torch has no derivative
scatter    of a strided part into a tensor: torch (2.13) gives the tensor the gradient of the part, not of the rest
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.recorder import Recorder
from autopar.errors import InvariantError
from autopar.operators.attention import attend

aten = torch.ops.aten


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        arguments = (x, weight) if bias is None else (x, weight, bias)
        with recorder.paused():
            result: Tensor = aten.linear.default(*arguments)
        recorder.record(aten.linear.default, arguments, {}, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            None,
            torch.mm(grad, weight).view(x.shape) if wants_x else None,
            torch.mm(grad.t(), x.reshape(-1, x.shape[-1])) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _linear(recorder: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2:
        result: Tensor = aten.linear.default(x, weight, bias)
        return result
    found: Tensor = _Linear.apply(recorder, x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _attention(recorder: Recorder, *args: Any, **kwargs: Any) -> Tensor:
    return attend(*args, **kwargs)


def _copy(recorder: Recorder, written: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(written.dtype).expand(written.shape)


class _StridedScatter(torch.autograd.Function):
    """``base`` with ``part`` in place of the elements at ``where`` (sizes, strides, offset)."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, base: Tensor, part: Tensor, where: Any) -> Tensor:
        ctx.where, ctx.part = where, part.shape
        with recorder.paused():
            result: Tensor = aten.as_strided_scatter.default(base, part, *where)
        recorder.record(aten.as_strided_scatter.default, (base, part, *where), {}, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        _, wants_base, wants_part, _ = ctx.needs_input_grad
        zeros = grad.new_zeros(ctx.part)
        return (
            None,
            aten.as_strided_scatter.default(grad, zeros, *ctx.where) if wants_base else None,
            aten.as_strided.default(grad, *ctx.where) if wants_part else None,
            None,
        )


def _strided_scatter(
    recorder: Recorder, base: Tensor, part: Tensor, size: Any, stride: Any, offset: int | None = None
) -> Tensor:
    if not base.is_contiguous():
        raise InvariantError(
            f"{recorder.origin.source or 'the model'} writes into a strided part of a tensor of shape "
            f"{list(base.shape)} that is not contiguous\nWay out: tensor.contiguous() before, or write by index."
        )
    where = (list(size), list(stride), offset)
    found: Tensor = _StridedScatter.apply(recorder, base, part, where)  # type: ignore[no-untyped-call]
    return found


DERIVATIVES: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.copy.default: _copy,
    aten.as_strided_scatter.default: _strided_scatter,
    aten.scaled_dot_product_attention.default: _attention,
}
