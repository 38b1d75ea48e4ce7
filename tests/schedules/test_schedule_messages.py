"""Sends and receives: where they stand, and that no timing of the ranks goes wrong with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import ScheduleError
from autopar.schedules.check import check_schedule
from autopar.schedules.instructions import Compute, Flow, Kind, Link, Schedule, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule
from autopar.schedules.text import format_schedule, parse_schedule
from tests.schedules.machine import run_on_machine

VALUES = (((2, 3), torch.float32),)


def inserted(text: str, links: tuple[Link, ...]) -> str:
    return format_schedule(with_messages(parse_schedule(text), links), width=1000)


def test_a_send_behind_its_compute_and_a_receive_one_compute_ahead() -> None:
    text = "rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1"
    assert inserted(text, chain(2)).splitlines()[1:] == [
        "rank 0: F0.0 SEND F0.0 -> 1 RECV B1.0 -> 0 F0.1 SEND F0.1 -> 1 RECV B1.1 -> 0 B0.0 B0.1",
        "rank 1: RECV F0.0 -> 1 F1.0 RECV F0.1 -> 1 B1.0 SEND B1.0 -> 0 F1.1 B1.1 SEND B1.1 -> 0",
    ]


def test_a_receive_is_posted_early_where_the_sender_sends_early() -> None:
    text = "rank 0: F0.0 F0.1\nrank 1: F1.1 F1.0"
    assert inserted(text, chain(2)).splitlines()[2] == "rank 1: RECV F0.0 -> 1 RECV F0.1 -> 1 F1.1 F1.0"


def test_nothing_is_sent_between_stages_of_one_rank_and_nothing_back_without_gradients() -> None:
    links = (Link(0, 1, VALUES, VALUES), Link(1, 2, VALUES, VALUES), Link(0, 2, VALUES, ()))
    text = "rank 0: F0.0 B0.0\nrank 1: F1.0 F2.0 B2.0 B1.0"
    assert inserted(text, links).splitlines()[1:] == [
        "rank 0: RECV B1.0 -> 0 F0.0 SEND F0.0 -> 1 SEND F0.0 -> 2 B0.0",
        "rank 1: RECV F0.0 -> 1 RECV F0.0 -> 2 F1.0 F2.0 B2.0 B1.0 SEND B1.0 -> 0",
    ]


def test_input_gradients_are_sent_before_the_weights_have_theirs() -> None:
    text = "rank 0: F0.0 I0.0 W0.0\nrank 1: F1.0 I1.0 W1.0"
    assert inserted(text, chain(2)).splitlines()[2] == "rank 1: RECV F0.0 -> 1 F1.0 I1.0 SEND B1.0 -> 0 W1.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank 0: F0.0 SEND F0.0 -> 1\nrank 1: F1.0", "holds sends and receives already"),
        ("rank 0: F0.0 F0.1\nrank 1: F1.0", "rank 1 is sent F0.1 -> 1 and never uses it"),
        ("rank 0: F0.0\nrank 1: F1.0 F1.1", "rank 1 needs F0.1 -> 1, which nothing makes"),
    ],
)
def test_what_cannot_have_messages(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        with_messages(parse_schedule(text), chain(2))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_made_schedules_run_under_any_timing(name: str, data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 11))
    made = make_schedule(name, p, m)
    links = chain(len(made.placement))
    random = data.draw(st.randoms(use_true_random=False))
    run_on_machine(with_messages(made, links), links, random.choice)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, tuple[Link, ...]]:
    """Any order of computes that respects what each needs, any placement, links that skip stages or lack gradients."""
    stages, ranks, microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    placement = tuple(draw(st.integers(0, ranks - 1)) for _ in range(stages))
    pairs = [(a, b) for b in range(stages) for a in range(b)]
    links = tuple(
        Link(a, b, VALUES, VALUES if draw(st.booleans()) else ()) for a, b in pairs if b == a + 1 or draw(st.booleans())
    )
    split = draw(st.booleans())
    kinds = (Kind.F, Kind.I, Kind.W) if split else (Kind.F, Kind.B)
    left = [Compute(kind, stage, i) for kind in kinds for stage in range(stages) for i in range(microbatches)]
    random, flow = draw(st.randoms(use_true_random=False)), Flow(stages, links)
    ready: set[object] = set()
    lists: list[list[Compute]] = [[] for _ in range(ranks)]
    while left:
        free = [step for step in left if set(needed(step, flow)) <= ready]
        step = random.choice(free)
        left.remove(step)
        lists[placement[step.stage]].append(step)
        ready |= {step, *flow.makes(step)}
    return Schedule("drawn", placement, microbatches, tuple(tuple(steps) for steps in lists)), links


def needed(step: Compute, flow: Flow) -> list[object]:
    before = {Kind.F: [], Kind.B: [Kind.F], Kind.I: [Kind.F], Kind.W: [Kind.I]}[step.kind]
    return [*flow.needs(step), *(Compute(kind, step.stage, step.microbatch) for kind in before)]


@given(drawn=schedules(), random=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_order_that_respects_needs_is_accepted_and_runs(
    drawn: tuple[Schedule, tuple[Link, ...]], random: object
) -> None:
    schedule, links = drawn
    whole = with_messages(schedule, links)
    check_schedule(whole, links)
    run_on_machine(whole, links, random.choice)  # type: ignore[attr-defined]
    assert parse_schedule(format_schedule(whole)) == whole


@given(drawn=schedules(), random=st.randoms(use_true_random=False), data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_accepted_after_a_change_runs_too(
    drawn: tuple[Schedule, tuple[Link, ...]], random: object, data: st.DataObject
) -> None:
    """Move one instruction: the check refuses it, or the ranks come to the end with the right messages."""
    schedule, links = drawn
    whole = with_messages(schedule, links)
    rank = data.draw(st.sampled_from([rank for rank, steps in enumerate(whole.ranks) if steps]))
    steps = list(whole.ranks[rank])
    moved = steps.pop(data.draw(st.integers(0, len(steps) - 1)))
    steps.insert(data.draw(st.integers(0, len(steps))), moved)
    ranks = tuple(tuple(steps) if other == rank else own for other, own in enumerate(whole.ranks))
    changed = Schedule("changed", whole.placement, whole.microbatches, ranks)
    try:
        check_schedule(changed, links)
    except ScheduleError as error:
        assert len(str(error).splitlines()) < 15
        return
    run_on_machine(changed, links, random.choice)  # type: ignore[attr-defined]
