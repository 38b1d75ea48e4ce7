"""One layer of an LSTM, GRU or RNN, in one direction, as one operator with its own backward.

    autopar::recurrent_layer(x, states, weights, cell) -> (y, last)
    autopar::recurrent_layer_backward(grad_y, grad_last, x, states, weights, cell) -> [dx, *dstates, *dweights]

    x (T, B, I)   y (T, B, P), the hidden states   states: h (B, P), and for "lstm" c (B, H); P = H without projection
    weights, as torch.nn orders them: w_ih (G H, I), w_hh (G H, P), b_ih (G H) and b_hh (G H) if there are biases, and
    w_hr (P, H) of an LSTM with a projection; G is 4 for "lstm", 3 for "gru", 1 for "rnn_tanh" and "rnn_relu"
    last: c (B, H) after the last step for "lstm", h (B, P) for the others

Torch decomposes such a layer differently on each device; without a fused kernel it becomes a dozen operators for each
step. One node keeps the graph small and the same everywhere. Its kernels call torch's best. The backward keeps only
the arguments of the forward, and runs it once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autopar.operators.registry import library

_SCHEMAS = (
    "recurrent_layer(Tensor x, Tensor[] states, Tensor[] weights, str cell) -> (Tensor, Tensor)",
    "recurrent_layer_backward(Tensor grad_y, Tensor grad_last, Tensor x, Tensor[] states, Tensor[] weights, str cell) "
    "-> Tensor[]",
)
_LIBRARY = library(*_SCHEMAS)
RECURRENT_LAYER = torch.ops.autopar.recurrent_layer.default
RECURRENT_LAYER_BACKWARD = torch.ops.autopar.recurrent_layer_backward.default

CELLS: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}
_AUTOGRAD_KEYS = ("AutogradOther", "AutogradFunctionality", "AutogradNestedTensor")


def _run(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str, train: bool) -> tuple[Tensor, ...]:
    first = [state.unsqueeze(0) for state in states]
    y, *final = CELLS[cell](
        x, first if cell == "lstm" else first[0], list(weights), len(weights) >= 4, 1, 0.0, train, False, False
    )
    return y, final[-1].squeeze(0)


def _layer(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, ...]:
    y, last = _run(x, states, weights, cell, False)
    return y.contiguous(), last.clone()


def _layer_backward(
    grad_y: Tensor, grad_last: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str
) -> list[Tensor]:
    with autograd_within():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *states, *weights)]
        count = 1 + len(states)
        results = _run(leaves[0], leaves[1:count], leaves[count:], cell, True)
        grads = torch.autograd.grad(results, leaves, (grad_y, grad_last))
    return [grad.contiguous() for grad in grads]


@contextmanager
def autograd_within() -> Iterator[None]:
    """Autograd within a kernel, where torch has it turned off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


_LIBRARY.impl("recurrent_layer", _layer, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("recurrent_layer_backward", _layer_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

# ---------------------------------------------------------------- shapes and derivative


@torch.library.register_fake("autopar::recurrent_layer", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], *states[0].shape)), x.new_empty(states[-1].shape)


@torch.library.register_fake("autopar::recurrent_layer_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(
    grad_y: Tensor, grad_last: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, *states, *weights)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, states, weights, ctx.cell = inputs
    ctx.count = len(states)
    ctx.save_for_backward(x, *states, *weights)


def _derivative(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    states, weights = rest[: ctx.count], rest[ctx.count :]
    grads = RECURRENT_LAYER_BACKWARD(grad_y, grad_last, x, states, weights, ctx.cell)
    return grads[0], list(grads[1 : 1 + ctx.count]), list(grads[1 + ctx.count :]), None


torch.library.register_autograd("autopar::recurrent_layer", _derivative, setup_context=_remember, lib=_LIBRARY)
