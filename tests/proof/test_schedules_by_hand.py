"""Schedules that are written by hand: those that may hang are refused with the circle, right ones are accepted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.mesh import Mesh
from autopar.proof.rank_events import Collective, Event, events_of
from autopar.proof.structure_order import check_order
from autopar.schedules.instructions import Compute, Flow, Instruction, Kind, Link, Receive, Schedule, Send, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.rendezvous import with_early_posts
from autopar.schedules.text import parse_schedule


def refused(schedule: Schedule, *more: Schedule, links: tuple[Link, ...] = (), axis: str = "tp") -> str:
    """What is refused of ranks that run by ``schedule``; with ``more``, the ranks at 1, 2, ... of ``axis`` by those.

    Then each compute has a sum over that axis in it.
    """
    every = schedule, *more
    flow = Flow(len(schedule.placement), links or chain(len(schedule.placement)))
    mesh = Mesh(pp=len(schedule.ranks), **{axis: len(every)})
    events = []
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        own, place = every[at[axis]], at["pp"]
        found: list[Event] = []
        for event in events_of(own.ranks[place], flow, own.placement, place):
            if not isinstance(event, Compute):
                found.append(event)
            elif more:
                found.append(Collective(axis, f"all_reduce over {axis} of f32[8]", f"{event.kind}{event.stage}"))
        events.append(found)
    return "\n".join(map(str, check_order(events, mesh)))


def written(text: str, links: tuple[Link, ...] = (), early: bool = True) -> Schedule:
    """A schedule of computes alone, with its messages; ``early``: receives are posted before sends that may wait."""
    schedule = parse_schedule(text)
    links = links or chain(len(schedule.placement))
    schedule = with_messages(schedule, links)
    return with_early_posts(schedule, Flow(len(schedule.placement), links)) if early else schedule


THREE = """
    rank 0: F0.0 F0.1 F0.2 B0.0 B0.1 B0.2
    rank 1: F1.0 F1.1 B1.0 F1.2 B1.1 B1.2
    rank 2: F2.0 B2.0 F2.1 B2.1 F2.2 B2.2
"""
INTERLEAVED = """
    rank 0: F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1
    rank 1: F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1
"""
HALVES = """
    rank 0: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1
    rank 1: F1.0 I1.0 F1.1 I1.1 W1.0 W1.1
"""
V = """
    rank 0: F0.0 F0.1 F3.0 B3.0 F3.1 B3.1 B0.0 B0.1
    rank 1: F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1
"""
SKIPPED = (*chain(3), Link(0, 2, chain(2)[0].values, ()))  # of which no gradient comes back


@pytest.mark.parametrize("text", [THREE, INTERLEAVED, HALVES, V], ids=["three", "interleaved", "halves", "v"])
def test_right_ones_are_accepted(text: str) -> None:
    schedule = written(text)
    assert refused(schedule) == ""
    assert refused(schedule, schedule) == ""  # with sums over tp between the ranks of a stage
    assert refused(schedule, schedule, schedule, axis="dp") == ""


def test_a_value_that_skips_a_stage_is_accepted() -> None:
    assert refused(written(THREE, SKIPPED), links=SKIPPED) == ""


CIRCLES = {
    "three stages, one behind the other": (
        """
        rank 0: F0.0 B0.0 F0.1 B0.1
        rank 1: F1.0 F1.1 B1.0 B1.1
        rank 2: F2.0 B2.0 F2.1 B2.1
        """,
        "2 ranks",
        ["rank 0 stands at B0.0", "rank 1 stands at F1.1"],
    ),
    "three ranks of two stages, all of them": (
        """
        rank 0: F0.0 F3.0 F0.1 F3.1 B3.0 B3.1 B0.0 B0.1
        rank 1: F1.1 F1.0 F4.0 F4.1 B4.0 B4.1 B1.0 B1.1
        rank 2: F2.0 F2.1 F5.0 B5.0 F5.1 B5.1 B2.0 B2.1
        """,
        "3 ranks",
        ["rank 0 stands at F3.0", "rank 1 stands at F1.1", "rank 2 stands at F2.0"],
    ),
    "interleaved": (
        """
        rank 0: F0.0 F2.0 F0.1 F2.1 B2.0 B0.0 B2.1 B0.1
        rank 1: F1.1 F1.0 F3.0 F3.1 B3.0 B1.0 B3.1 B1.1
        """,
        "2 ranks",
        ["rank 1 stands at F1.1", "rank 0 stands at F2.0"],
    ),
    "halves": (
        """
        rank 0: F0.0 I0.0 W0.0 F0.1 I0.1 W0.1
        rank 1: F1.0 F1.1 I1.0 I1.1 W1.0 W1.1
        """,
        "2 ranks",
        ["rank 0 stands at I0.0", "rank 1 stands at F1.1"],
    ),
}


@pytest.mark.parametrize("case", CIRCLES)
def test_those_that_hang_are_refused_with_the_circle(case: str) -> None:
    text, ranks, words = CIRCLES[case]
    found = refused(written(text, early=False))
    assert f"structure: {ranks} " in found and "wait for each other for ever:" in found, found
    assert all(each in found for each in words), found


def test_one_that_hangs_only_where_sends_wait() -> None:
    text = """
        rank 0: F0.0 F0.1 F2.0 B2.0 F2.1 B2.1 B0.0 B0.1
        rank 1: F1.0 F3.0 B3.0 F1.1 F3.1 B3.1 B1.0 B1.1
    """
    late = written(text, early=False)
    moved = []
    for own in late.ranks:  # each receive where its message is needed
        received = {step.message: step for step in own if not isinstance(step, Compute | Send)}
        steps: list[Instruction] = []
        for step in own:
            if isinstance(step, Compute):
                kind = Kind.F if step.kind is Kind.F else Kind.B
                needs = [m for m in received if (m.kind, m.target, m.microbatch) == (kind, step.stage, step.microbatch)]
                steps += [received[m] for m in needs]
            if isinstance(step, Compute | Send):
                steps.append(step)
        moved.append(tuple(steps))
    found = refused(replace(late, ranks=tuple(moved)))
    assert "wait for each other for ever where a send waits for its receiver" in found and "stands at SEND" in found
    assert refused(written(text)) == ""


def test_sums_and_messages_that_cross() -> None:
    """On one line of ranks the second microbatch comes first: each sum waits for a rank that waits for a message."""
    other = written("rank 0: F0.0 F0.1 B0.0 B0.1\n rank 1: F1.0 F1.1 B1.0 B1.1")
    late = written("rank 0: F0.0 B0.0 F0.1 B0.1\n rank 1: F1.0 B1.0 F1.1 B1.1")
    found = refused(late, other, axis="dp")
    assert "wait for each other for ever:" in found and "all_reduce over dp" in found and "which needs" in found, found


@pytest.mark.parametrize("kind", [Kind.F, Kind.B])
def test_more_messages_on_one_side(kind: Kind) -> None:
    schedule = written(THREE)

    def without(rank: int, dropped: type) -> Schedule:
        steps = list(schedule.ranks[rank])
        gone = next(step for step in steps if type(step) is dropped and step.kind is kind)
        steps.remove(gone)
        return replace(schedule, ranks=(*schedule.ranks[:rank], tuple(steps), *schedule.ranks[rank + 1 :]))

    sender, taker = (0, 1) if kind is Kind.F else (2, 1)
    found = refused(without(sender, Send))
    assert f"rank {taker}" in found and f"for rank {sender}" in found and "waits" in found, found
    found = refused(without(taker, Receive))
    assert "which nobody receives" in found, found
    steps = (*schedule.ranks[1], Receive(Kind.F, 1, 2, 0))
    twice = replace(schedule, ranks=(schedule.ranks[0], steps, schedule.ranks[2]))
    assert refused(twice) == ""  # the same memory twice is for the contracts to see
    strange = replace(
        schedule, ranks=(schedule.ranks[0], (*schedule.ranks[1], Receive(Kind.B, 1, 0, 0)), schedule.ranks[2])
    )
    assert "which nobody sends" in refused(strange)
