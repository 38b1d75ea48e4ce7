"""ZB-V: two stages per rank, down the ranks and up again; no rank idles between its first compute and its last.

Qi et al. 2024, "Pipeline Parallelism with Controllable Memory" (V-ZB); Qi et al. 2023, "Zero Bubble Pipeline
Parallelism", section 6. It holds 2p activations of half-size stages on every rank: as much as 1F1B's first rank.
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute
from autopar.schedules.parts import Lists, Writer, bounce, first_microbatches


def zb_v(p: int, m: int, v: int) -> Lists:
    """The schedule for m microbatches; below 2p, the schedule of 2p without the microbatches beyond m."""
    return first_microbatches([_rank(rank, p, max(m, 2 * p)) for rank in range(p)], m)


def _rank(rank: int, p: int, m: int) -> list[Compute]:
    writer = Writer([bounce(rank, turn, p) for turn in (0, 1)])
    early = 2 * (p - rank) - 1  # forwards on the way down, until the first microbatch comes up again
    writer.write("F0", early)
    writer.write("F1 F0", rank)
    writer.write("F1 I1 W1", p - rank)
    writer.write("F0 I0 W0 F1 I1 W1", m - early - rank)
    writer.write("I0 W0 F1 I1 W1", p - 1 - rank)  # the first stage has no forwards left
    writer.write("I0 I1", rank)
    writer.write("I0 W0", p - rank)
    return writer.finish()
