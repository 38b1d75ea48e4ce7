"""Operators that are differentiated in our own way, so that graphs stay short and fit for any device.

linear     stays one operator in forward (torch breaks it into t, view, mm, view); backward is two matrix products
attention  our operator, which is the same on every device (``operators/attention.py``)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.operators.attention import attend
from autopar.recorder import Recorder

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
    found: Tensor = _Linear.apply(recorder, x, weight, bias)
    return found


def _attention(recorder: Recorder, *args: Any, **kwargs: Any) -> Tensor:
    return attend(*args, **kwargs)


DERIVATIVES: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
}
