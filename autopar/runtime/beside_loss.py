"""Outputs beside the loss. A program has the gradients of the loss alone: a backward pass from another is refused.

Without a word ``(output.loss + aux(output.logits)).backward()`` would give the gradients of its first term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.errors import InvariantError

Give = Callable[[Tensor], Tensor]


def beside_loss(loss: Tensor, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs ``tensors``, which nobody else has, so that a backward pass from one names it and stops.

    They require gradients, as those of the unmodified model do, and lead to the parameters by way of the ``loss``:
    where gradients of some are asked for by name, autograd passes by here too.
    """
    found: tuple[Tensor, ...] = _Refusing.apply(loss, names, tensors)  # type: ignore[no-untyped-call]
    return found


class BesideLoss:
    """The outputs of a program that :func:`beside_loss` gives: ``places`` among its results, with names and forms."""

    def __init__(self, places: Sequence[tuple[int, str, Give]]) -> None:
        self._places = places

    def of(self, loss: Tensor, returned: Sequence[Tensor]) -> dict[int, Tensor]:
        """The user's tensors, by place."""
        if not self._places:
            return {}
        made = [_own(give(returned[at])) for at, _, give in self._places]
        return dict(
            zip([at for at, *_ in self._places], beside_loss(loss, [name for _, name, _ in self._places], made))
        )


def _own(tensor: Tensor) -> Tensor:
    """``tensor`` that is nobody's parameter or saved value; a DTensor is made for each call."""
    return tensor if isinstance(tensor, DTensor) else tensor.detach()


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ctx.names = names
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        used = [f"'{name}'" for name, grad in zip(ctx.names, grads) if grad is not None]
        if not used:
            return None, None, None
        raise InvariantError(
            f"a backward pass starts at output {', '.join(used)} beside the loss, and the program has the gradients of "
            "the loss alone\n"
            "Way out: call the model so that it returns no loss (without labels), and compute all of it from its "
            "outputs; or return the sum as the loss, from a small nn.Module around the model; for numbers only, "
            "output.detach()."
        )
