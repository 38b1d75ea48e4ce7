"""Schedules as text: what is printed is read back, people may leave things out, errors name line and word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import ScheduleError
from autopar.schedules.instructions import Compute, Kind, Receive, Schedule, Send, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule
from autopar.schedules.text import format_schedule, parse_schedule


def test_the_form() -> None:
    text = format_schedule(with_messages(make_schedule("1f1b", 2, 2), chain(2)))
    assert text == (
        "schedule 1f1b microbatches=2 placement=0,1\n"
        "rank 0: F0.0 SEND F0.0 -> 1 RECV B1.0 -> 0 F0.1 SEND F0.1 -> 1 RECV B1.1 -> 0 B0.0 B0.1\n"
        "rank 1: RECV F0.0 -> 1 F1.0 RECV F0.1 -> 1 B1.0 SEND B1.0 -> 0 F1.1 B1.1 SEND B1.1 -> 0\n"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [20, 110])
def test_round_trip(name: str, width: int) -> None:
    made = make_schedule(name, 3, 7)
    for schedule in (made, with_messages(made, chain(len(made.placement)))):
        text = format_schedule(schedule, width)
        assert parse_schedule(text) == schedule
        assert max(map(len, text.splitlines()[1:])) <= max(width, len("rank 0: SEND F0.0 -> 1"))


numbers = st.integers(0, 30)
computes = st.builds(Compute, st.sampled_from(Kind), numbers, numbers)
messages = st.sampled_from([Send, Receive]).flatmap(
    lambda which: st.builds(which, st.sampled_from([Kind.F, Kind.B]), numbers, numbers, numbers)
)


@given(steps=st.lists(computes | messages), first=computes, width=st.integers(10, 200))
@settings(max_examples=80, deadline=None)
def test_any_instructions_round_trip(steps: list[Compute | Send | Receive], first: Compute, width: int) -> None:
    """Whether or not they make sense."""
    schedule = Schedule("drawn", (0, 1, 1), 5, ((first, *steps), tuple(steps[::-1])))
    assert parse_schedule(format_schedule(schedule, width)) == schedule


def test_what_people_write() -> None:
    schedule = parse_schedule("""
        # two stages on rank 0, one on rank 1
        rank 0: F0.0 F0.1      # warm up
                F1.0 F1.1
                B1.0 B0.0

                B1.1 B0.1
        rank 1:
          F2.0 B2.0 F2.1 B2.1
    """)
    assert (schedule.name, schedule.placement, schedule.microbatches) == ("custom", (0, 0, 1), 2)
    assert " ".join(map(str, schedule.ranks[0])) == "F0.0 F0.1 F1.0 F1.1 B1.0 B0.0 B1.1 B0.1"
    named = parse_schedule("schedule mine placement=1,0\nrank 0: F1.0\nrank 1: F0.0")
    assert (named.name, named.placement) == ("mine", (1, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line that starts with 'rank 0:'"),
        ("rank 0:", "the text has no computes, like F0.0"),
        ("F0.0 F0.1", "line 1, 'F0.0': instructions start with 'rank 0:'"),
        ("rank 0: F0.0\n\n  F0.x", "line 3, 'F0.x': no instruction; there are F0.3, B0.3, I0.3, W0.3, SEND F0.3 -> 1"),
        ("rank 0: F0.0\nrank 1: f1.0", "line 2, 'f1.0': no instruction"),
        ("rank 0: F0.0 SEND F0.0 1", "line 1, 'SEND F0.0 1': a message is SEND F0.3 -> 1 or SEND B1.3 -> 0"),
        ("rank 0: F0.0 RECV W0.0 -> 1", "line 1, 'RECV W0.0 -> 1': a message is RECV F0.3 -> 1"),
        ("rank 0: F0.0 SEND F0.0 > 1", "line 1, 'SEND F0.0 > 1': a message is"),
        ("rank 0: F0.0\nrank 0: F0.1", "line 2: rank 0 starts twice, on line 1 already"),
        ("rank 0: F0.0\nrank 2: F1.0", "there are lines for rank 2, and none for rank 1"),
        ("rank 0: F0.0\nrank 1: F1.0 F0.1", "line 2, 'F0.1': stage 0 is computed on rank 0 too (line 1)"),
        ("rank 0: F0.0 F2.0", "stage 2 is computed, and stage 1 is not"),
        ("schedule s stages=4\nrank 0: F0.0", "line 1, 'stages=4': the first line is schedule NAME microbatches=4"),
        ("schedule s placement=0,x\nrank 0: F0.0", "line 1, 'placement=0,x': the first line is schedule NAME"),
    ],
)
def test_errors_name_line_and_word(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as refused:
        parse_schedule(text)
    assert message in str(refused.value)
