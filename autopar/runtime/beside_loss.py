"""Outputs beside the loss. A program has the gradients of the loss alone: a backward pass from another is refused.

Without a word ``(output.loss + aux(output.logits)).backward()`` would give the gradients of its first term. So with the
gradient of such an output, which ``output.logits.retain_grad()`` or a hook waits for. A gradient that is zero on every
rank (``0 * output.logits.sum()``) adds nothing, and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import local_of
from autopar.errors import InvariantError

Give = Callable[[Tensor], Tensor]
Everyone = Callable[[Any], list[Any]]  # what each rank says of what this one says; collective

WAY_OUT = (
    "Way out: call the model so that it returns no loss (without labels), and compute all of it from its outputs; or "
    "return the sum as the loss, from a small nn.Module around the model; for numbers only, output.detach()."
)


def beside_loss(
    loss: Tensor, names: Sequence[str], tensors: Sequence[Tensor], everyone: Everyone | None = None
) -> tuple[Tensor, ...]:
    """The outputs ``tensors``, which nobody else has, so that a backward pass from one names it and stops.

    They require gradients, as those of the unmodified model do, and lead to the parameters by way of the ``loss``:
    where gradients of some are asked for by name, autograd passes by here too. ``everyone``: None where not all ranks
    have these outputs.
    """
    found: tuple[Tensor, ...] = _Refusing.apply(loss, names, tensors, everyone)  # type: ignore[no-untyped-call]
    node: Any = loss.grad_fn
    node.beside = [*getattr(node, "beside", ()), *map(_Beside, names, map(ref, found))]
    return found


@dataclass(frozen=True)
class _Beside:
    name: str
    tensor: ref[Tensor]


def check_unwatched(node: Any) -> None:
    """Raise InvariantError where somebody waits for the gradient of an output that :func:`beside_loss` gave.

    ``node``: the loss is its output, and a backward pass has come to it.
    """
    for one in getattr(node, "beside", ()):
        tensor = one.tensor()
        if tensor is not None and (tensor.retains_grad or tensor._backward_hooks):
            does = "retains its gradient (retain_grad)" if tensor.retains_grad else "has a hook (register_hook)"
            raise InvariantError(
                f"output '{one.name}' beside the loss {does}, and the program has no gradient of it: it would be None, "
                f"and the hook not called\n{WAY_OUT}"
            )


class BesideLoss:
    """The outputs of a program that :func:`beside_loss` gives: ``places`` among its results, with names and forms."""

    def __init__(self, places: Sequence[tuple[int, str, Give]], everyone: Everyone) -> None:
        self._places, self._everyone = places, everyone

    def of(self, loss: Tensor, returned: Sequence[Tensor]) -> dict[int, Tensor]:
        """The user's tensors, by place."""
        if not self._places:
            return {}
        made = [_own(give(returned[at])) for at, _, give in self._places]
        found = beside_loss(loss, [name for _, name, _ in self._places], made, self._everyone)
        return dict(zip([at for at, *_ in self._places], found))


def _own(tensor: Tensor) -> Tensor:
    """``tensor`` that is nobody's parameter or saved value; a DTensor is made for each call."""
    return tensor if isinstance(tensor, DTensor) else tensor.detach()


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, names: Sequence[str], tensors: Sequence[Tensor], everyone: Everyone | None
    ) -> tuple[Tensor, ...]:
        ctx.names, ctx.everyone = names, everyone
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        given = {name: grad for name, grad in zip(ctx.names, grads) if grad is not None}
        if not given:
            return None, None, None, None
        mine = [name for name, grad in given.items() if ctx.everyone is None or local_of(grad).any()]
        used = sorted({name for said in ctx.everyone(mine) for name in said}) if ctx.everyone is not None else mine
        if not used:
            return None, None, None, None
        shown = ", ".join(f"'{name}'" for name in used)
        raise InvariantError(
            f"a backward pass starts at output {shown} beside the loss, and the program has the gradients of the loss "
            f"alone\n{WAY_OUT}"
        )
