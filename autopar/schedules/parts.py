"""Common parts of the schedules: the rank of each stage, the writer of a rank's list, fewer microbatches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from autopar.schedules.instructions import BACKWARD, Compute, Kind

Lists = list[list[Compute]]  # the computes of each rank


def loop(rank: int, turn: int, p: int) -> int:
    """The ``turn``-th stage of ``rank`` where stages go round the ranks: 0 1 2 0 1 2."""
    return turn * p + rank


def bounce(rank: int, turn: int, p: int) -> int:
    """The ``turn``-th stage (0 or 1) of ``rank`` where stages go down the ranks and up again: 0 1 2 2 1 0."""
    return 2 * p - 1 - rank if turn else rank


def first_microbatches(lists: Sequence[Sequence[Compute]], m: int) -> Lists:
    """``lists`` without the microbatches from m on. No other compute depends on those, so the lists stay valid."""
    return [[step for step in steps if step.microbatch < m] for steps in lists]


class Writer:
    """One rank's list, written in phases. Microbatches are numbered automatically.

    ``write("F0 I1", 3)`` writes three times: the next forward of the rank's first stage, then the next input gradient
    of its second. ``W`` alone is the weight gradient that has waited longest, or nothing where none waits.
    """

    def __init__(self, stages: Sequence[int]) -> None:
        self.stages = stages
        self.steps: list[Compute] = []
        self._next: Counter[tuple[bool, int]] = Counter()  # (backward?, turn) -> microbatch
        self._late: deque[tuple[int, int]] = deque()  # (turn, microbatch) whose W is to come

    def write(self, phase: str, times: int = 1) -> None:
        for token in phase.split() * times:
            kind = Kind(token[0])
            if kind is Kind.W:
                self._write_late(token[1:])
                continue
            turn = int(token[1:])
            microbatch = self._next[kind in BACKWARD, turn]
            self._next[kind in BACKWARD, turn] += 1
            self.steps.append(Compute(kind, self.stages[turn], microbatch))
            if kind is Kind.I:
                self._late.append((turn, microbatch))

    def finish(self) -> list[Compute]:
        """The list, completed with the weight gradients that have not been written yet."""
        self.write("W", len(self._late))
        return self.steps

    def _write_late(self, turn: str) -> None:
        chosen = next((late for late in self._late if not turn or late[0] == int(turn)), None)
        if chosen is not None:
            self._late.remove(chosen)
            self.steps.append(Compute(Kind.W, self.stages[chosen[0]], chosen[1]))
