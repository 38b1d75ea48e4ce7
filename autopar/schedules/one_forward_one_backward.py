"""1F1B: a backward as soon as possible, then one forward, one backward. Bubble (p-1)/m; p - rank in flight.

PipeDream-Flush of Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training".
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute, Kind
from autopar.schedules.parts import Lists


def one_forward_one_backward(p: int, m: int, v: int) -> Lists:
    lists: Lists = []
    for rank in range(p):
        warm = min(p - 1 - rank, m)
        there, back = ([Compute(kind, rank, i) for i in range(m)] for kind in (Kind.F, Kind.B))
        steady = [step for pair in zip(there[warm:], back) for step in pair]
        lists.append(there[:warm] + steady + back[m - warm :])
    return lists
