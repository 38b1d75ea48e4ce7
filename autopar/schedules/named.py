"""Pipeline schedules, one file each: functions from (p, m, v) to the computes of every rank, in order.

p pipeline ranks, m microbatches, v stages per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.schedules.dualpipe_v import dualpipe_v
from autopar.schedules.gpipe import gpipe
from autopar.schedules.inference import inference
from autopar.schedules.instructions import Kind, Schedule
from autopar.schedules.interleaved import interleaved
from autopar.schedules.one_forward_one_backward import one_forward_one_backward
from autopar.schedules.parts import Lists, bounce, loop
from autopar.schedules.zb_h1 import zb_h1
from autopar.schedules.zb_v import zb_v

Stage = Callable[[int, int, int], int]  # (rank, turn, p) -> the turn-th stage of a rank


@dataclass(frozen=True)
class Bubble:
    """Idle over computing time where F, I and W take equally long and B twice that, and messages no time: (p-1)/(n m)
    for ``n = parts(v)``, from ``least(v) * p`` microbatches on."""

    text: str
    parts: Callable[[int], int]
    least: Callable[[int], int]

    def value(self, p: int, m: int, v: int) -> float | None:
        """None where m is too small for the formula."""
        return (p - 1) / (self.parts(v) * m) if m >= self.least(v) * p else None


@dataclass(frozen=True)
class Maker:
    """How a schedule is made: the computes from (p, m, v), the rank of each stage, and the v that it takes."""

    lists: Callable[[int, int, int], Lists]
    bubble: Bubble
    stage: Stage = loop
    only: int | None = None  # the one v that it takes
    usual: int = 1  # v where none is given


PLAIN = Bubble("(p-1)/m", lambda v: 1, lambda v: 0)
TURNS = Bubble("(p-1)/(v m)", lambda v: v, lambda v: 0 if v == 1 else 1)
THIRD = Bubble("(p-1)/(3 m)", lambda v: 3, lambda v: 1)
SIXTH = Bubble("(p-1)/(6 m)", lambda v: 6, lambda v: 2)

NAMES: dict[str, Maker] = {
    "gpipe": Maker(gpipe, TURNS),
    "1f1b": Maker(one_forward_one_backward, PLAIN, only=1),
    "interleaved": Maker(interleaved, TURNS, usual=2),
    "zb-h1": Maker(zb_h1, THIRD, only=1),
    "zb-v": Maker(zb_v, SIXTH, bounce, only=2),
    "dualpipe-v": Maker(dualpipe_v, SIXTH, bounce, only=2),
    "inference": Maker(inference, TURNS),
}


def stages_per_rank(name: str, v: int | None = None) -> int:
    """v where it is given and fits, else what the schedule usually takes. Raises ValueError."""
    if name not in NAMES:
        raise ValueError(f"there is no schedule '{name}'; there are {', '.join(NAMES)}")
    maker = NAMES[name]
    if maker.only is not None and v not in (None, maker.only):
        free = ", ".join(other for other, its in NAMES.items() if its.only is None)
        raise ValueError(
            f"schedule {name} has {maker.only} stage{'s' * (maker.only > 1)} per rank, not {v}\n"
            f"Way out: leave the number out, or choose one that takes any ({free})."
        )
    return v if v is not None else maker.only or maker.usual


def make_schedule(name: str, p: int, m: int, v: int | None = None, backward: bool = True) -> Schedule:
    """The computes of schedule ``name`` on p ranks for m microbatches, v stages per rank (left out: what it usually
    takes). Without ``backward`` only its forwards, on the same placement. Raises ValueError."""
    v = stages_per_rank(name, v)
    for what, size in (("pipeline ranks", p), ("microbatches", m), ("stages per rank", v)):
        if size < 1:
            raise ValueError(f"schedule {name}: {size} {what}; it takes at least 1")
    lists = NAMES[name].lists(p, m, v)
    if not backward:
        lists = [[step for step in steps if step.kind is Kind.F] for steps in lists]
    placement = [0] * (p * v)
    for rank in range(p):
        for turn in range(v):
            placement[NAMES[name].stage(rank, turn, p)] = rank
    return Schedule(name, tuple(placement), m, tuple(tuple(steps) for steps in lists))
