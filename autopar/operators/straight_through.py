"""A value with the gradient of another one: the form of a hand-written backward pass in a graph of ordinary operators.

    autopar::straight_through(value, surrogate) -> value

Both have one shape and dtype. The result is ``value``, to which no gradient flows. The whole gradient of the result is
the gradient of ``surrogate``, whose numbers are never used: the nodes that compute them are dead code once the backward
pass is derived. (The straight-through estimator of Bengio et al. 2013, with any surrogate in place of the identity.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.operators.registry import library

_LIBRARY = library("straight_through(Tensor value, Tensor surrogate) -> Tensor")
STRAIGHT_THROUGH = torch.ops.autopar.straight_through.default


@torch.library.register_fake("autopar::straight_through", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(value: Tensor, surrogate: Tensor) -> Tensor:
    if value.shape != surrogate.shape or value.dtype != surrogate.dtype:
        raise ValueError(
            f"straight_through: a value {value.dtype} {list(value.shape)} and a surrogate {surrogate.dtype} "
            f"{list(surrogate.shape)} are not of one type"
        )
    return torch.empty_like(value)


def _kernel(value: Tensor, surrogate: Tensor) -> Tensor:
    return value.clone()  # an operator may not return its argument's memory


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    pass


def _derivative(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    return None, grad


_LIBRARY.impl("straight_through", _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_autograd("autopar::straight_through", _derivative, setup_context=_remember, lib=_LIBRARY)
