"""Outputs beside the loss. A program has the gradients of the loss alone: a backward pass from another is refused.

Without a word ``(output.loss + aux(output.logits)).backward()`` would give the gradients of its first term. So with the
gradient of such an output, which ``output.logits.retain_grad()`` or a hook waits for. A gradient that is zero on every
rank (``0 * output.logits.sum()``) adds nothing, and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.autodiff.autograd import keep_hooks
from autopar.dtensors.dtensor import local_of
from autopar.errors import InvariantError

Give = Callable[[Tensor], Tensor]
Everyone = Callable[[Any], list[Any]]  # what each rank says of what this one says; collective
Watched = list[tuple[str, ReferenceType[Tensor]]]  # outputs with their names, to be asked whether somebody waits

WAY_OUT = (
    "Way out: call the model so that it returns no loss (without labels), and compute all of it from its outputs; or "
    "return the sum as the loss, from a small nn.Module around the model; for numbers only, output.detach()."
)


class BesideLoss:
    """The outputs of a program beside its loss, ``outputs``: the place of each among its results, name and form.

    They are outputs of the same node of autograd's graph as the loss, so that its backward pass is told of gradients of
    theirs, also where those of some parameters are asked for by name.
    """

    def __init__(self, outputs: Sequence[tuple[int, str, Give]], everyone: Everyone) -> None:
        self.places = [at for at, *_ in outputs]
        self._names = [name for _, name, _ in outputs]
        self._gives = [give for *_, give in outputs]
        self._everyone = everyone

    def of(self, returned: Sequence[Tensor]) -> list[Tensor]:
        """The user's tensors, of all that the program has returned."""
        return [_own(give(returned[at])) for at, give in zip(self.places, self._gives)]

    def watched(self, tensors: Sequence[Tensor]) -> Watched:
        """``tensors`` that were given, for :func:`check_unwatched`."""
        return watched(self._names, tensors)

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Raise InvariantError where gradients of outputs arrive that are not zero on all ranks."""
        if any(grad is not None for grad in grads):
            _refuse(self._names, grads, self._everyone)


def _own(tensor: Tensor) -> Tensor:
    """``tensor`` that is nobody's parameter or saved value; a DTensor is made for each call."""
    return tensor if isinstance(tensor, DTensor) else tensor.detach()


def watched(names: Sequence[str], tensors: Sequence[Tensor]) -> Watched:
    """What :func:`check_unwatched` takes. Hooks of users are kept, and not called: there is nothing for them."""
    for tensor in tensors:
        keep_hooks(tensor)
    return list(zip(names, map(ref, tensors)))


def check_unwatched(outputs: Watched) -> None:
    """Raise InvariantError where somebody waits for the gradient of one of ``outputs``."""
    for name, reference in outputs:
        tensor = reference()
        if tensor is not None and (tensor.retains_grad or tensor._backward_hooks):
            does = "retains its gradient (retain_grad)" if tensor.retains_grad else "has a hook (register_hook)"
            raise InvariantError(
                f"output '{name}' beside the loss {does}, and the program has no gradient of it: it would be None, "
                f"and the hook not called\n{WAY_OUT}"
            )


# ---------------------------------------------------------------- outputs that are made after the node of the loss


def beside_loss(loss: Tensor, name: str, tensor: Tensor) -> Tensor:
    """The output ``tensor``, which nobody else has and not all ranks have: a node of its own, that leads to ``loss``.

    Whose gradient is asked for: :func:`check_unwatched` of :func:`outputs_of`.
    """
    found: Tensor = _Refusing.apply(loss, name, tensor)  # type: ignore[no-untyped-call]
    node: Any = loss.grad_fn
    node.beside = outputs_of(node) + watched([name], [found])
    return found


def outputs_of(node: Any) -> Watched:
    """Those that :func:`beside_loss` gave for the loss that ``node`` made."""
    found: Watched = getattr(node, "beside", [])
    return found


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, name: str, tensor: Tensor) -> Tensor:
        ctx.name = name
        ctx.set_materialize_grads(False)
        return tensor.detach()  # no view of it, into which nobody may write

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        _refuse([ctx.name], [grad], None)
        return None, None, None


def _refuse(names: Sequence[str], grads: Sequence[Tensor | None], everyone: Everyone | None) -> None:
    """``everyone``: None where not all ranks have these outputs."""
    given = {name: grad for name, grad in zip(names, grads) if grad is not None}
    mine = [name for name, grad in given.items() if everyone is None or local_of(grad).any()]
    used = sorted({name for said in everyone(mine) for name in said}) if everyone is not None else mine
    if not used:
        return
    shown = ", ".join(f"'{name}'" for name in used)
    raise InvariantError(
        f"a backward pass starts at output {shown} beside the loss, and the program has the gradients of the loss "
        f"alone\n{WAY_OUT}"
    )
