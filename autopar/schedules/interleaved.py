"""Interleaved 1F1B: every rank holds v stages, p apart, which cuts the bubble to (p-1)/(v m) for m >= p.

Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2.
Microbatches go in groups: all of a group through the rank's first stage, then all through its second, and so on. The
paper takes groups of p, and m a multiple of p. A group below p would idle; a group above p does not, it only holds
more activations. So any m is cut into groups of p or slightly more, as even as possible.
"""

from __future__ import annotations

from collections.abc import Iterator

from autopar.schedules.instructions import Compute, Kind
from autopar.schedules.parts import Lists, loop


def interleaved(p: int, m: int, v: int) -> Lists:
    return [_rank(rank, p, m, v) for rank in range(p)]


def groups(p: int, m: int) -> list[range]:
    """m microbatches in groups of at least p (one group where m < p), the larger ones first."""
    count = max(1, m // p)
    size, larger = divmod(m, count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [range(start, stop) for start, stop in zip(starts, starts[1:])]


def forwards(rank: int, p: int, m: int, v: int) -> Iterator[Compute]:
    """All forwards of a rank."""
    for group in groups(p, m):
        for turn in range(v):
            yield from (Compute(Kind.F, loop(rank, turn, p), i) for i in group)


def _backwards(rank: int, p: int, m: int, v: int) -> Iterator[Compute]:
    for group in groups(p, m):
        for turn in reversed(range(v)):
            yield from (Compute(Kind.B, loop(rank, turn, p), i) for i in group)


def _rank(rank: int, p: int, m: int, v: int) -> list[Compute]:
    there, back = list(forwards(rank, p, m, v)), list(_backwards(rank, p, m, v))
    # the first backward of the last stage waits for v - 1 groups; on each earlier rank it comes two steps later
    warm = min((v - 1) * len(groups(p, m)[0]) + 2 * (p - 1 - rank), m * v)
    if v == 1:
        warm = min(p - 1 - rank, m)  # 1F1B: one step is enough where no group waits for another
    steady = [step for pair in zip(there[warm:], back) for step in pair]
    return there[:warm] + steady + back[m * v - warm :]
