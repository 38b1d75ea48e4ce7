"""What the schedules are made of: where stages lie, and one microbatch fewer."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.instructions import Compute

Lists = list[list[Compute]]  # the computes of each rank


def loop(rank: int, turn: int, p: int) -> int:
    """The ``turn``-th stage of ``rank`` where stages go round the ranks: 0 1 2 0 1 2."""
    return turn * p + rank


def bounce(rank: int, turn: int, p: int) -> int:
    """The ``turn``-th stage (0 or 1) of ``rank`` where stages go down the ranks and up again: 0 1 2 2 1 0."""
    return 2 * p - 1 - rank if turn else rank


def first_microbatches(lists: Sequence[Sequence[Compute]], m: int) -> Lists:
    """``lists`` without the microbatches from m on. Nothing else depends on those, so what was right stays right."""
    return [[step for step in steps if step.microbatch < m] for steps in lists]
