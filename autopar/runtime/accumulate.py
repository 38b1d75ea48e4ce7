"""Gradient accumulation without communication: inside ``no_sync``, gradients are added up on their rank.

The next backward pass outside of it reduces the sum of all. Inside, the backward pass leaves out the reductions over
the data axes (:func:`autopar.autodiff.hoist.without_reductions`); sums over other axes belong to the computation and
stay, but for those of what the data axes have reduced (a tied embedding): they wait with it.

``zero_grad`` forgets what waits, as it forgets ``.grad``: a script that is stopped between two batches starts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer


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

    def give(self, grads: Sequence[Tensor]) -> None:
        """Add gradients to those of the parameters."""


class Accumulation:
    """The state of one parallel module: whether it is inside ``no_sync``, and the sums of its programs so far."""

    def __init__(self) -> None:
        self.active = False
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

    def backward(self, steps: Steps, saved: list[Any], adds: Sequence[bool]) -> Sequence[Tensor] | None:
        """The gradients of a backward pass and of all that waited for it; None if it waits itself.

        ``adds``: which of them are to be added to those of parameters. Unless all are (``autograd.grad``), nothing
        waits for this pass, nor it for others.
        """
        if not (self.active or self._held) or not all(adds):
            return steps.whole(saved)
        if not steps.defers:
            if not self.active:
                self._give_all()
            return steps.whole(saved)
        found = steps.partial(saved)
        held = self._held.pop(steps, None)
        if held is not None:
            for total, part in zip(held, found):
                total.add_(part)
            found = held
        if self.active:
            self._held[steps] = found
            return None
        self._give_all()
        return steps.reduced(found)

    def _give_all(self) -> None:
        while self._held:
            other, waiting = self._held.popitem()
            other.give(other.reduced(waiting))

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
                    steps.give(steps.reduced(waiting))


_all: WeakKeyDictionary[Accumulation, None] = WeakKeyDictionary()  # in one order on all ranks: they may communicate


@cache
def _watch_optimizers() -> None:
    """From the first ``no_sync`` on, let ``zero_grad`` of all optimizers forget what waits."""
    plain = Optimizer.zero_grad

    @wraps(plain)
    def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
        for accumulation in list(_all):
            accumulation.forget(parameter for group in optimizer.param_groups for parameter in group["params"])
        plain(optimizer, set_to_none)

    forgetting: Any = zero_grad
    Optimizer.zero_grad = forgetting  # type: ignore[method-assign]
