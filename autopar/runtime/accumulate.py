"""Gradient accumulation without communication: inside ``no_sync``, gradients are added up on their rank.

The next backward pass outside of it reduces the sum of all. Inside, the backward pass leaves out the reductions over
the data axes (:func:`autopar.autodiff.hoist.without_reductions`); sums over other axes belong to the computation and
stay, but for those of what the data axes have reduced (a tied embedding): they wait with it.

``.grad`` has what it has on one device: in it stands a gradient that waits (:mod:`autopar.dtensors.waiting`). A script
that computes with one, a step of an optimizer too, has all that waits reduced first, on every rank; ``.grad = None``
drops what waits for it.

A hook on a parameter's gradient sees what it would on one device. In ``no_sync`` that is the gradient of each backward
pass, which then does not wait. Of a batch in microbatches it is that of the whole: all parts wait, and are given at the
end, also where there is nothing to communicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from autopar.autodiff.autograd import WITNESS, is_watched
from autopar.dtensors.waiting import Stand, can_wait, stand_in, stands
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

    def give(self, grads: Sequence[Tensor], past_hooks: bool, waiting: Sequence[Stand] | None) -> None:
        """Add gradients to those of the parameters, or to those that are ``waiting`` for them.

        ``past_hooks``: hooks on the parameters do not see them.
        """

    def agree(self, what: str) -> None:
        """Have all ranks say that they do ``what`` now. Raises RanksDifferError where one does something else."""


@dataclass
class Held:
    """The sums of one program so far.

    Attributes:
        stands: what waits for them in ``.grad``; None for parts of one batch, where nobody can look there.
        gone: how many of these nobody has any more.
    """

    sums: list[Tensor]
    stands: list[Stand] | None = None
    gone: int = 0


class Accumulation:
    """The state of one parallel module: whether it is inside ``no_sync``, and the sums of its programs so far."""

    def __init__(self) -> None:
        self.active = False
        self._is_seen = False  # the script is inside no_sync, and not only a batch that runs in parts
        self._collects = False  # in a batch of several parts: all of them wait
        self._held: dict[Steps, Held] = {}

    @contextmanager
    def no_sync(self, is_seen: bool = True) -> Iterator[None]:
        before = self.active, self._is_seen
        self.active, self._is_seen = True, self._is_seen or is_seen
        try:
            yield
        finally:
            self.active, self._is_seen = before

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Within this context its parts have their backward passes; where one fails, the others add nothing."""
        try:
            yield
        except BaseException:
            self._held = {steps: held for steps, held in self._held.items() if held.stands is not None}
            raise

    def backward_of_part(self, loss: Tensor, is_last: bool, parameters: Iterable[Tensor]) -> None:
        """``loss.backward()`` of one part of a batch; hooks on ``parameters`` see the gradients of all, once."""
        if not any(map(is_watched, parameters)):
            with nullcontext() if is_last else self.no_sync(is_seen=False):
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
        """The gradients of a backward pass and of all that waited for it; None if it waits, or they are given.

        ``adds``: which of them are to be added to those of parameters. Unless all are (``autograd.grad``), nothing
        waits for this pass, nor it for others.
        """
        if self._collects:
            self._collect(steps, saved)
            return None
        if not (self.active or self._held) or not all(adds):
            return steps.whole(saved)
        self._drop()
        if not steps.defers or any(map(is_watched, steps.parameters)) or not all(map(can_wait, steps.parameters)):
            self._give_all()
            return steps.whole(saved)
        if not self.active and steps not in self._held:
            self._give_all()
            return steps.whole(saved)
        held = self._add(steps, steps.partial(saved))
        if self._is_seen and held.stands is None:
            gone = partial(self._gone, steps, ref(held))
            held.stands = [stand_in(parameter, self.complete, gone) for parameter in steps.parameters]
        if self.active:
            return None
        del self._held[steps]
        self._give_all()
        if held.stands is None:
            return steps.reduced(held.sums)
        _give(steps, held)
        return None

    def _collect(self, steps: Steps, saved: list[Any]) -> None:
        if any(held.stands is not None for held in self._held.values()):
            self._give_all()  # of passes before this batch
        found = steps.partial(saved) if steps.defers else steps.whole(saved)
        if not steps.defers and len(found) > len(steps.parameters):
            raise InvariantError(
                "a tensor of the batch asks for a gradient, and hooks on parameters for those of all microbatches\n"
                "Way out: detach() the tensor, or remove the hooks, or Plan(microbatches=1)."
            )
        self._add(steps, found)

    def _add(self, steps: Steps, found: Sequence[Tensor]) -> Held:
        held = self._held.get(steps)
        if held is None:
            held = self._held[steps] = Held(list(found))
            return held
        for total, part in zip(held.sums, found):
            total.add_(part)
        return held

    def complete(self) -> None:
        """Give all that waits, as somebody computes with a gradient for which it does; collective."""
        self._forget_taken()
        if self._held:
            next(iter(self._held)).agree("computing with gradients that wait since no_sync()")
            with torch.inference_mode(False), torch.no_grad():
                self._drop()
                self._give_all()

    def _give_all(self, past_hooks: bool = True) -> None:
        """Hooks that are there now were not in the passes that waited in ``no_sync``."""
        while self._held:
            steps = next(iter(self._held))
            _give(steps, self._held.pop(steps), past_hooks)

    def _drop(self) -> None:
        """Forget sums for gradients that a script has taken away; where others are part of such a sum, give all now."""
        self._forget_taken()
        if not all(all(_remain(steps, held)) for steps, held in self._held.items()):
            self._give_all()

    def _forget_taken(self) -> None:
        """Forget sums of which all gradients were taken away: alike on all ranks, whoever still has one."""
        for steps, held in list(self._held.items()):
            if held.stands and not any(_remain(steps, held)):
                self._held.pop(steps, None)

    def _gone(self, steps: Steps, of: ReferenceType[Held], _: Stand) -> None:
        """Nobody has one of the gradients any more; free the sums with the last one, not only when they are missed."""
        held = of()
        if held is not None and held.stands is not None and self._held.get(steps) is held:
            held.gone += 1
            if held.gone == len(held.stands):
                self._held.pop(steps, None)


def _remain(steps: Steps, held: Held) -> Iterator[bool]:
    return map(stands, steps.parameters, held.stands) if held.stands is not None else iter(())


def _give(steps: Steps, held: Held, past_hooks: bool = True) -> None:
    grads = steps.reduced(held.sums) if steps.defers else held.sums
    steps.give(grads, past_hooks, held.stands)
