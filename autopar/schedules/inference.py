"""Forwards only, for inference and evaluation: groups of p microbatches go through all stages of a rank. No bubble but
the p - 1 steps until the last rank starts."""

from __future__ import annotations

from autopar.schedules.interleaved import forwards
from autopar.schedules.parts import Lists, first_microbatches


def inference(p: int, m: int, v: int) -> Lists:
    rounded = -(-m // p) * p
    return first_microbatches([list(forwards(rank, p, rounded, v)) for rank in range(p)], m)
