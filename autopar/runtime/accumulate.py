"""Gradient accumulation without communication: inside ``no_sync``, gradients are added up on their rank.

The next backward pass outside of it reduces the sum of all. Inside, the backward pass leaves out the reductions over
the data axes (:func:`autopar.autodiff.hoist.without_reductions`); sums over other axes belong to the computation and
stay, but for those of what the data axes have reduced (a tied embedding): they wait with it.

``zero_grad`` forgets what waits, as it forgets ``.grad``: a script that is stopped between two batches starts anew.
A step of an optimizer for whose parameters something waits would leave it out, and is refused.

A hook on a parameter's gradient sees what it would on one device. In ``no_sync`` that is the gradient of each backward
pass, which then does not wait. Of a batch in microbatches it is that of the whole: all parts wait, and are given at the
end, also where there is nothing to communicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autopar.autodiff.autograd import WITNESS, is_watched
from autopar.errors import InvariantError


class Steps(Protocol):
    """One program's backward pass on this rank, whole and in two parts."""

    @property
    def defers(self) -> bool:
        """Whether it has two parts."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Those that it gives gradients."""

    def whole(self, saved: list[Any]) -> Sequence[Tensor]:
        """The whole backward pass; gives gradients."""

    def partial(self, saved: list[Any]) -> list[Tensor]:
        """The backward pass without reductions; gives their operands, in memory of its own."""

    def reduced(self, partial: list[Tensor]) -> Sequence[Tensor]:
        """The reductions; gives gradients."""

    def give(self, grads: Sequence[Tensor], past_hooks: bool) -> None:
        """Add gradients to those of the parameters; ``past_hooks``: hooks on these do not see them."""


class Accumulation:
    """The state of one parallel module: whether it is inside ``no_sync``, and the sums of its programs so far."""

    def __init__(self) -> None:
        self.active = False
        self._collects = False  # in a batch of several parts: all of them wait
        self._held: dict[Steps, list[Tensor]] = {}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        _watch_optimizers()
        _all[self] = None
        before, self.active = self.active, True
        try:
            yield
        finally:
            self.active = before

    def backward_of_part(self, loss: Tensor, is_last: bool, parameters: Iterable[Tensor]) -> None:
        """``loss.backward()`` of one part of a batch; hooks on ``parameters`` see the gradients of all, once."""
        if not any(map(is_watched, parameters)):
            with nullcontext() if is_last else self.no_sync():
                loss.backward()  # type: ignore[no-untyped-call]
            return
        self._collects = True
        try:
            torch.autograd.backward((loss,), inputs=(WITNESS,))  # past the parameters, and so their hooks
        finally:
            self._collects = False
        if is_last:
            self._give_all(past_hooks=False)

    def backward(self, steps: Steps, saved: list[Any], adds: Sequence[bool]) -> Sequence[Tensor] | None:
        """The gradients of a backward pass and of all that waited for it; None if it waits itself.

        ``adds``: which of them are to be added to those of parameters. Unless all are (``autograd.grad``), nothing
        waits for this pass, nor it for others.
        """
        if self._collects:
            found = steps.partial(saved) if steps.defers else steps.whole(saved)
            if not steps.defers and len(found) > len(steps.parameters):
                raise InvariantError(
                    "a tensor of the batch asks for a gradient, and hooks on parameters for those of all microbatches\n"
                    "Way out: detach() the tensor, or remove the hooks, or Plan(microbatches=1)."
                )
            self._held[steps] = self._with_held(steps, found)
            return None
        if not (self.active or self._held) or not all(adds):
            return steps.whole(saved)
        if not steps.defers or any(map(is_watched, steps.parameters)):
            if not self.active:
                self._give_all()
            return steps.whole(saved)
        together = self._with_held(steps, steps.partial(saved))
        if self.active:
            self._held[steps] = together
            return None
        self._give_all()
        return steps.reduced(together)

    def _with_held(self, steps: Steps, found: Sequence[Tensor]) -> list[Tensor]:
        held = self._held.pop(steps, None)
        if held is None:
            return list(found)
        for total, part in zip(held, found):
            total.add_(part)
        return held

    def _give_all(self, past_hooks: bool = True) -> None:
        """Hooks that are there now were not in the passes that waited in ``no_sync``."""
        while self._held:
            other, waiting = self._held.popitem()
            _give(other, waiting, past_hooks)

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Forget what waits for ``parameters``; where other parameters have a part in a sum, it is given to all now."""
        if not self._held:
            return  # as in most steps, before going through all parameters
        forgotten = {id(parameter) for parameter in parameters}
        for steps in list(self._held):
            own = {id(parameter) for parameter in steps.parameters}
            if own & forgotten:
                waiting = self._held.pop(steps)
                if own - forgotten:
                    _give(steps, waiting)

    def refuse_waiting(self, parameters: Iterable[Tensor], what: str) -> None:
        """Raise InvariantError where sums for ``parameters`` wait: ``what`` would be without them."""
        if not self._held:
            return
        asked, waiting = {id(parameter) for parameter in parameters}, set[int]()
        for steps in self._held:
            waiting |= asked & {id(parameter) for parameter in steps.parameters}
        if waiting:
            raise InvariantError(
                f"gradients of {len(waiting)} of {len(asked)} parameters wait since no_sync(): {what} would be without "
                "them\nWay out: the last backward pass before it outside of no_sync(), also where an epoch ends with "
                "fewer batches; zero_grad() forgets what waits."
            )


def _give(steps: Steps, waiting: list[Tensor], past_hooks: bool = True) -> None:
    steps.give(steps.reduced(waiting) if steps.defers else waiting, past_hooks)


_all: WeakKeyDictionary[Accumulation, None] = WeakKeyDictionary()  # in one order on all ranks: they may communicate


@cache
def _watch_optimizers() -> None:
    """From the first ``no_sync`` on, let ``zero_grad`` of all optimizers forget what waits, and ``step`` refuse it."""
    plain = Optimizer.zero_grad

    @wraps(plain)
    def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
        for accumulation in list(_all):
            accumulation.forget(parameter for group in optimizer.param_groups for parameter in group["params"])
        plain(optimizer, set_to_none)

    forgetting: Any = zero_grad
    Optimizer.zero_grad = forgetting  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: Optimizer, args: Any, options: Any) -> None:
    for accumulation in list(_all):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        accumulation.refuse_waiting(parameters, f"a step of {type(optimizer).__name__}")
