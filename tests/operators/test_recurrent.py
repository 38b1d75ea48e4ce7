"""The recurrent layer as one operator: against torch.nn, its derivative numerically, its fake shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.operators.recurrent import RECURRENT_LAYER, RECURRENT_LAYER_BACKWARD

STEPS, ROWS, WIDTH, HIDDEN = 5, 3, 4, 6
FORMS: dict[str, tuple[type[nn.RNNBase], dict[str, Any], str]] = {
    "lstm": (nn.LSTM, {}, "lstm"),
    "lstm-projected": (nn.LSTM, {"proj_size": 2}, "lstm"),
    "lstm-projected-no-bias": (nn.LSTM, {"proj_size": 2, "bias": False}, "lstm"),
    "gru": (nn.GRU, {}, "gru"),
    "rnn-tanh": (nn.RNN, {"bias": False}, "rnn_tanh"),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}, "rnn_relu"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def arguments(form: str, dtype: torch.dtype = torch.float64) -> tuple[nn.RNNBase, Tensor, list[Tensor], list[Tensor]]:
    """The module, x, the states and the weights."""
    torch.manual_seed(0)
    kind, options, cell = FORMS[form]
    module = kind(WIDTH, HIDDEN, **options).to(dtype)
    x = torch.randn(STEPS, ROWS, WIDTH, dtype=dtype, requires_grad=True)
    widths = [options.get("proj_size", HIDDEN), *([HIDDEN] if cell == "lstm" else [])]
    states = [torch.randn(ROWS, width, dtype=dtype, requires_grad=True) for width in widths]
    return module, x, states, list(module.parameters())


def results(module: nn.RNNBase, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The steps and the last cell (or hidden) state, as torch.nn has them."""
    given = [state.unsqueeze(0) for state in states]
    y, final = module(x, tuple(given) if len(given) > 1 else given[0])
    return y, (final[-1] if isinstance(final, tuple) else final).squeeze(0)


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_module(form: str, dtype: torch.dtype) -> None:
    module, x, states, weights = arguments(form, dtype)
    expected = results(module, x, states)
    found = RECURRENT_LAYER(x, states, weights, FORMS[form][2])
    leaves = [x, *states, *weights]
    cotangents = [torch.randn_like(tensor) for tensor in expected]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    true = torch.autograd.grad(expected, leaves, cotangents)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, cotangents), true, rtol=tolerance, atol=tolerance)


@each_form
def test_derivative(form: str) -> None:
    _, x, states, weights = arguments(form)
    count = len(states)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, last = RECURRENT_LAYER(leaves[0], leaves[1 : 1 + count], leaves[1 + count :], FORMS[form][2])
        return y, last

    assert torch.autograd.gradcheck(function, (x, *states, *weights))


@each_form
def test_fake_shapes(form: str) -> None:
    _, x, states, weights = arguments(form)
    cell = FORMS[form][2]
    with torch.no_grad():
        forward = RECURRENT_LAYER(x, states, weights, cell)
        backward = RECURRENT_LAYER_BACKWARD(*forward, x, states, weights, cell)
        mode = FakeTensorMode()
        x, *rest = (mode.from_tensor(tensor) for tensor in (x, *states, *weights))
        states, weights = rest[: len(states)], rest[len(states) :]
        with mode:
            faked = RECURRENT_LAYER(x, states, weights, cell)
            faked_backward = RECURRENT_LAYER_BACKWARD(*faked, x, states, weights, cell)
    for real, fake in zip((*forward, *backward), (*faked, *faked_backward), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
