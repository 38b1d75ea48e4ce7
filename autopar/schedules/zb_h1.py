"""ZB-H1: 1F1B whose backward is split in two, the gradients of the weights put where ranks would idle.

Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 3.1: the memory of 1F1B's first rank, p microbatches, on
every rank, and a third of its bubble where F, I and W take equally long: (p-1)(F+I-W) instead of (p-1)(F+I+W).
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute, Kind
from autopar.schedules.parts import Lists


def zb_h1(p: int, m: int, v: int) -> Lists:
    """As 1F1B, but ``rank`` is that many microbatches late with its W, which it catches up at the end.

    Being early with I without being early with W is what the later ranks have memory for: rank r warms up with
    p - 1 - r forwards, so that with r late W it holds p activations, as rank 0 does.
    """
    lists: Lists = []
    for rank in range(p):
        warm = min(p - 1 - rank, m)
        steps = [Compute(Kind.F, rank, i) for i in range(warm)]
        for i in range(m):
            if warm + i < m:
                steps.append(Compute(Kind.F, rank, warm + i))
            steps.append(Compute(Kind.I, rank, i))
            if i >= rank:
                steps.append(Compute(Kind.W, rank, i - rank))
        steps += [Compute(Kind.W, rank, i) for i in range(max(0, m - rank), m)]
        lists.append(steps)
    return lists
