"""Against ``torch.distributed.pipelining``: the same orders, or where they differ the same idle times and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.pipelining.schedules as peer

from autopar.schedules.instructions import Compute, Kind, Schedule
from autopar.schedules.named import make_schedule
from autopar.schedules.timing import peak_in_flight, timeline

CLASSES = {
    "interleaved": peer.ScheduleInterleaved1F1B,
    "zb-v": peer.ScheduleZBVZeroBubble,
    "dualpipe-v": peer.ScheduleDualPipeV,
}


def order(name: str, rank: int, p: int, m: int, v: int) -> tuple[Compute, ...]:
    """What torch computes on a rank. Its constructors want stages with models; the order needs their numbers alone."""
    made: Any = object.__new__(CLASSES[name])
    made.pp_group_size, made.rank, made._n_microbatches, made.n_local_stages = p, rank, m, v
    made.num_stages = made._num_stages = p * v
    made.number_of_rounds = max(1, m // p)
    made.microbatches_per_round = m // made.number_of_rounds
    actions = [one for action in made._calculate_single_rank_operations(rank) if action for one in parts(action)]
    kinds = {kind.value for kind in Kind}
    return tuple(Compute(Kind(kind), stage, i) for stage, kind, i in actions if kind in kinds)


def parts(action: Any) -> list[tuple[int, str, int]]:
    return [
        (one.stage_index, one.computation_type.value, one.microbatch_index) for one in action.sub_actions or [action]
    ]


@pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        *(("interleaved", p, rounds * p, v) for p in (2, 4, 8) for rounds in (1, 2, 4) for v in (2, 3)),
        *(("interleaved", p, m, 2) for p, m in ((2, 3), (4, 7), (4, 10))),  # rounds of more than p
        *(("dualpipe-v", p, m, 2) for p in (2, 3, 4, 8) for m in (2 * p, 2 * p + 1, 4 * p)),
    ],
)
def test_the_same_order(name: str, p: int, m: int, v: int) -> None:
    ours = make_schedule(name, p, m, v)
    assert ours.ranks == tuple(order(name, rank, p, m, v) for rank in range(p))


@pytest.mark.parametrize(("p", "m"), [(p, m) for p in (2, 3, 4, 8) for m in (p, 2 * p, 2 * p + 1, 4 * p)])
def test_zb_v_idles_and_holds_the_same(p: int, m: int) -> None:
    """Only the last weight gradients stand in another order: here those that have waited longest come first."""
    ours = make_schedule("zb-v", p, m)
    theirs = Schedule("torch", ours.placement, m, tuple(order("zb-v", rank, p, m, 2) for rank in range(p)))
    assert (timeline(ours).seconds, timeline(ours).bubble) == (timeline(theirs).seconds, timeline(theirs).bubble)
    for rank in range(p):
        assert peak_in_flight(ours.computes(rank)) == peak_in_flight(theirs.computes(rank))
        for kind in (Kind.F, Kind.I):
            mine, other = ([s for s in whole.computes(rank) if s.kind is kind] for whole in (ours, theirs))
            assert mine == other
