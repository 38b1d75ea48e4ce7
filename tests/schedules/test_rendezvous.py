"""Schedules on a machine where a send waits until its receiver has posted memory for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from autopar.schedules import messages
from autopar.schedules.check import check_schedule
from autopar.schedules.instructions import Compute, Flow, Message, Receive, Schedule, Send, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule
from autopar.schedules.text import parse_schedule


def left_over(schedule: Schedule, choose: Callable[[list[int]], int]) -> list[int]:
    """The ranks that never end, where ranks advance one instruction at a time, in the order that ``choose`` gives."""
    flow, place = Flow(len(schedule.placement), chain(len(schedule.placement))), schedule.placement
    at = [0] * len(schedule.ranks)
    posted: set[Message] = set()
    sent: set[Message] = set()

    def can(rank: int) -> bool:
        if at[rank] == len(schedule.ranks[rank]):
            return False
        step = schedule.ranks[rank][at[rank]]
        if isinstance(step, Compute):
            return all(m in sent for m in flow.needs(step) if place[m.source] != rank)
        return isinstance(step, Receive) or step.message in posted

    while ready := [rank for rank in range(len(at)) if can(rank)]:
        rank = choose(ready)
        step = schedule.ranks[rank][at[rank]]
        if not isinstance(step, Compute):
            (sent if isinstance(step, Send) else posted).add(step.message)
        at[rank] += 1
    return [rank for rank, steps in enumerate(schedule.ranks) if at[rank] < len(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_no_rank_hangs_where_sends_wait(name: str) -> None:
    random.seed(0)
    for p, m in ((2, 4), (3, 7), (4, 8)):
        made = make_schedule(name, p, m)
        schedule = with_messages(made, chain(len(made.placement)))
        check_schedule(schedule, chain(len(made.placement)))
        for _ in range(3):
            assert left_over(schedule, random.choice) == [], (name, p, m)


@pytest.mark.parametrize("name", ["interleaved", "zb-v", "dualpipe-v"])
def test_some_would_hang_without_earlier_posts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is: the machine above can fail."""
    monkeypatch.setattr(messages, "with_early_posts", lambda schedule, flow: schedule)
    made = make_schedule(name, 4, 8)
    schedule = with_messages(made, chain(len(made.placement)))
    check_schedule(schedule, chain(len(made.placement)))  # it is right where sends leave at once
    assert left_over(schedule, min)


def test_only_what_has_to_moves() -> None:
    """Computes and sends keep their order, and schedules that do not need it their receives."""
    for name in NAMES:
        made = make_schedule(name, 4, 8)
        whole = with_messages(made, chain(len(made.placement)))
        rest = replace(whole, ranks=tuple(tuple(s for s in steps if isinstance(s, Compute)) for steps in whole.ranks))
        assert rest == made


def test_a_schedule_that_hangs_anyway_stays_as_it_is() -> None:
    made = parse_schedule("schedule mine placement=0,1\nrank 0: B0.0 F0.0\nrank 1: F1.0 B1.0")
    whole = with_messages(made, chain(2))
    assert left_over(whole, min) == [0, 1]
    assert [list(whole.computes(rank)) for rank in (0, 1)] == list(map(list, made.ranks))
