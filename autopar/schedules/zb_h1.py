"""ZB-H1: 1F1B whose backward is split in two; weight gradients are computed where ranks would idle.

Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 3.1. Every rank holds p microbatches, as the first rank of
1F1B does. The bubble is a third of that of 1F1B where F, I and W take equally long: (p-1)(F+I-W), not (p-1)(F+I+W).
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute, Kind
from autopar.schedules.parts import Lists


def zb_h1(p: int, m: int, v: int) -> Lists:
    """1F1B in which ``rank`` is that many microbatches late with its W, and catches up at the end.

    The later ranks have memory to be early with I and late with W: rank r warms up with p - 1 - r forwards, and with r
    late W it holds p activations, as rank 0 does.
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
