"""GPipe: all forwards, then all backwards. Bubble (p-1)/m; all m microbatches are in flight.

Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism". With several stages
per rank it is the breadth-first schedule of Lamy-Poirier 2022, with bubble (p-1)/(v m) for m >= p.
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute, Kind
from autopar.schedules.parts import Lists, loop


def gpipe(p: int, m: int, v: int) -> Lists:
    lists: Lists = []
    for rank in range(p):
        stages = [loop(rank, turn, p) for turn in range(v)]
        there = [Compute(Kind.F, stage, i) for stage in stages for i in range(m)]
        back = [Compute(Kind.B, stage, i) for stage in reversed(stages) for i in range(m)]
        lists.append(there + back)
    return lists
