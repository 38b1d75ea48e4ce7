"""Gradient accumulation without communication: inside ``no_sync``, gradients are added up on their rank.

The next backward pass outside of it reduces the sum of all. Inside, the backward pass leaves out the reductions over
the data axes (:func:`autopar.autodiff.hoist.without_reductions`); sums over other axes belong to the computation and
stay, but for those of what the data axes have reduced (a tied embedding): they wait with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor


class Steps(Protocol):
    """One program's backward pass on this rank, whole and in two parts."""

    @property
    def defers(self) -> bool:
        """Whether it has two parts."""

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
        before, self.active = self.active, True
        try:
            yield
        finally:
            self.active = before

    def backward(self, steps: Steps, saved: list[Any]) -> Sequence[Tensor] | None:
        """The gradients of a backward pass and of all that waited for it; None if it waits itself."""
        if not (self.active or self._held) or not steps.defers:
            return steps.whole(saved)
        held, found = self._held.pop(steps, None), steps.partial(saved)
        if held is not None:
            for total, part in zip(held, found):
                total.add_(part)
            found = held
        if self.active:
            self._held[steps] = found
            return None
        while self._held:
            other, waiting = self._held.popitem()
            other.give(other.reduced(waiting))
        return steps.reduced(found)
