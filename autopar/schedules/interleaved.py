"""Interleaved 1F1B: every rank holds v stages, p apart, which cuts the bubble to (p-1)/(v m).

Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2.
Microbatches go in groups of p: all of a group through the rank's first stage, then through its second, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator

from autopar.instructions import Compute, Kind
from autopar.schedules.parts import Lists, first_microbatches, loop


def interleaved(p: int, m: int, v: int) -> Lists:
    """Where m is no multiple of p: the schedule of the next multiple, less the microbatches beyond m."""
    rounded = -(-m // p) * p
    return first_microbatches([_rank(rank, p, rounded, v) for rank in range(p)], m)


def forwards(rank: int, p: int, m: int, v: int) -> Iterator[Compute]:
    """All forwards of a rank, for m a multiple of p."""
    for start in range(0, m, p):
        for turn in range(v):
            yield from (Compute(Kind.F, loop(rank, turn, p), start + i) for i in range(p))


def _backwards(rank: int, p: int, m: int, v: int) -> Iterator[Compute]:
    for start in range(0, m, p):
        for turn in reversed(range(v)):
            yield from (Compute(Kind.B, loop(rank, turn, p), start + i) for i in range(p))


def _rank(rank: int, p: int, m: int, v: int) -> list[Compute]:
    first, second = list(forwards(rank, p, m, v)), list(_backwards(rank, p, m, v))
    # the last stage's first backward has to wait for v - 1 groups; each rank before it for two more steps
    warm = min(2 * (p - 1 - rank) + (v - 1) * p, m * v)
    steady = [step for pair in zip(first[warm:], second) for step in pair]
    return first[:warm] + steady + second[m * v - warm :]
