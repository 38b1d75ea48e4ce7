"""Local gradients of a rank program become those of parameters, and of inputs, as autograd would have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.autodiff.autograd import is_watched
from autopar.dtensors.dtensor import kind_of_spec, local_of, new_dtensor, of_local, spec_of
from autopar.weights.absent import Table
from autopar.weights.border import trimmed

Give = Callable[[Tensor, bool], Tensor | None]


@dataclass(frozen=True)
class Giver:
    """Makes a local gradient that of a parameter, or adds it; gives it as a DTensor where autograd is to do so."""

    table: Table
    key: str

    def __call__(self, grad: Tensor, accumulate: bool) -> Tensor | None:
        parameter: Any = self.table[self.key]
        local, held = local_of(parameter), parameter.grad
        if grad.numel() != local.numel():  # a third of the time of comparing shapes
            grad = trimmed(grad, local.shape)
        spec = spec_of(parameter)
        if not accumulate or is_watched(parameter):
            return of_local(grad, spec)
        if not parameter.requires_grad:
            return None  # frozen since the forward pass: torch's leaves take nothing then
        if held is None:
            parameter.grad = of_local(grad, spec)  # as autograd would, without 20 us of DTensor's dispatch
        elif spec_of(held) is spec or spec_of(held) == spec:
            local_of(held).add_(grad)
        else:
            return of_local(grad, spec)
        return None


class Givers:
    """Gives all gradients of one backward pass, by ``gives``; what is usual of parameters is written out here.

    ``grads``: one of each, to tell what has to be trimmed. Each step pays 1 us less for a parameter.
    """

    def __init__(self, gives: Sequence[Give], grads: Sequence[Tensor]) -> None:
        self._each = [(give, *_usual(give, grad)) for give, grad in zip(gives, grads)]

    def __call__(self, grads: Sequence[Tensor], accumulate: Sequence[bool]) -> list[Tensor | None]:
        """As :class:`Giver` for each."""
        found: list[Tensor | None] = []
        new: Any = new_dtensor
        for (give, table, key, spec, kind), grad, wanted in zip(self._each, grads, accumulate):
            parameter = table[key]
            if (
                wanted
                and spec is not None
                and parameter._spec is spec
                and parameter.grad is None
                and parameter.requires_grad
                and not parameter._backward_hooks
                and not parameter._post_accumulate_grad_hooks
            ):
                parameter.grad = new(kind, grad, spec, requires_grad=False)
                found.append(None)
            else:
                found.append(give(grad, wanted))
        return found


def _usual(give: Give, grad: Tensor) -> tuple[Table, str, Any, Any]:
    """(table, key, spec, class) of a parameter of which gradients are given as they are; else a spec of None."""
    held = give.table[give.key] if isinstance(give, Giver) else None
    if not isinstance(give, Giver) or not isinstance(held, DTensor) or grad.numel() != local_of(held).numel():
        return {"": None}, "", None, None
    return give.table, give.key, spec_of(held), kind_of_spec(spec_of(held))


def put(give: Give, parameter: Tensor, grad: Tensor, *, past_hooks: bool = False) -> None:
    """Add a local gradient to that of ``parameter``; by autograd where hooks watch it, which are to see it."""
    if past_hooks and parameter.requires_grad and is_watched(parameter):
        whole = give(grad, False)
        assert whole is not None
        parameter.grad = whole if parameter.grad is None else parameter.grad.add_(whole)
        return
    whole = give(grad, True)
    if whole is not None:
        with torch.enable_grad():
            torch.autograd.backward((parameter,), (whole,))
