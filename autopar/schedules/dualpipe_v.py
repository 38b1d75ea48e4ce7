"""DualPipe-V: two stages per rank, down the ranks and up again; forwards and backwards of different stages in pairs.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1 (DualPipe), and their DualPipeV, the half of it that
holds every parameter once. The purpose of a pair is to compute one half while the other communicates; here the forward
is listed first, then the backward. Weight gradients are split off only where ranks would idle. A rank holds 2p + 1
activations.
"""

from __future__ import annotations

from autopar.schedules.instructions import Compute
from autopar.schedules.parts import Lists, Writer, bounce, first_microbatches


def dualpipe_v(p: int, m: int, v: int) -> Lists:
    """The schedule for m microbatches; below 2p, the schedule of 2p without the microbatches beyond m."""
    return first_microbatches([_rank(rank, p, max(m, 2 * p)) for rank in range(p)], m)


def _rank(rank: int, p: int, m: int) -> list[Compute]:
    writer = Writer([bounce(rank, turn, p) for turn in (0, 1)])
    rest = p - 1 - rank  # ranks after this one
    writer.write("F0", 2 * rest)
    writer.write("F0 F1", rank + 1)
    writer.write("I1 W F1", rest)
    writer.write("F0 B1 F1 B0", m - 2 * p + rank + 1)
    writer.write("B1 F1 B0", rest)
    # from the middle of this phase on, W waits for the idle times at the end
    pairs = ["B1", "B0"] * (rank + 1)
    writer.write(" ".join(pairs[: rank + 1]))
    writer.write(" ".join(pairs[rank + 1 :]).replace("B", "I"))
    writer.write("W I0", rest)
    return writer.finish()
