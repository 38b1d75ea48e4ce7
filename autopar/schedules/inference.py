"""Forwards only, for inference and evaluation: groups of p or slightly more microbatches pass all stages of a rank.

A rank idles only in the p - 1 steps until the last rank starts: bubble (p-1)/(v m) for m >= p.
"""

from __future__ import annotations

from autopar.schedules.interleaved import forwards
from autopar.schedules.parts import Lists


def inference(p: int, m: int, v: int) -> Lists:
    return [list(forwards(rank, p, m, v)) for rank in range(p)]
