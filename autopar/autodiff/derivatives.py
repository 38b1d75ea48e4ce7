"""Derivatives of our own for some operators, so that graphs stay short and suit every device.

linear     stays one operator in forward (torch decomposes it into t, view, mm, view); backward is two matrix products
attention  our operator, which is the same on every device (:mod:`autopar.operators.attention`)
copy       the functional form of ``copy_``, for which torch has no derivative
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.recorder import Recorder
from autopar.ir.node import Node
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


DERIVATIVES: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.copy.default: _copy,
    aten.scaled_dot_product_attention.default: _attention,
}

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def unrepeated_heads(keys: Node, values: Node, tensors: Mapping[Node, Tensor]) -> tuple[Node, Node]:
    """The keys and values (B, Hkv, S, D) whose heads these (B, H, S, D) repeat one by one, or else these themselves.

    Models write grouped-query attention as unsqueeze, expand, reshape. Our attention takes the fewer heads directly, so
    the repeated ones are neither computed nor saved. It requires as many heads of keys as of values: where one of the
    two has been converted in between (a gather of repeated heads), both stay repeated.
    """
    fewer = _unrepeated(keys, tensors), _unrepeated(values, tensors)
    heads = [tensors[source].shape[1:2] for source in fewer]
    return fewer if heads[0] == heads[1] else (keys, values)


def _unrepeated(node: Node, tensors: Mapping[Node, Tensor]) -> Node:
    if node.target not in RESHAPES:
        return node
    expand = node.all_input_nodes[0]
    if expand.target is aten.clone.default:
        expand = expand.all_input_nodes[0]
    unsqueeze = expand.all_input_nodes[0] if expand.target is aten.expand.default else node
    if unsqueeze.target is not aten.unsqueeze.default:
        return node
    source = unsqueeze.all_input_nodes[0]
    if tensors[source].dim() != 4 or tensors[expand].dim() != 5:
        return node
    batch, heads, length, width = tensors[source].shape
    repeats = tensors[expand].shape[2]
    wide = tensors[unsqueeze].shape == (batch, heads, 1, length, width)
    expanded = tensors[expand].shape == (batch, heads, repeats, length, width)
    merged = tensors[node].shape == (batch, heads * repeats, length, width)
    return source if wide and expanded and merged else node
