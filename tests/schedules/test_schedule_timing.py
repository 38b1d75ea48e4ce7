"""When computes start: by hand for small ones, and what messages and uneven stages add."""

from __future__ import annotations

import pytest

from autopar.errors import ScheduleError
from autopar.schedules.instructions import Kind, Link, chain
from autopar.schedules.named import make_schedule
from autopar.schedules.text import parse_schedule
from autopar.schedules.timing import Event, Timeline, peak_in_flight, timeline


def spans(line: Timeline, rank: int) -> list[tuple[str, float, float]]:
    return [(f"{e.kind}{e.stage}.{e.microbatch}", e.start_s, e.end_s) for e in line.ranks[rank]]


def test_by_hand() -> None:
    line = timeline(make_schedule("1f1b", 2, 2))
    assert spans(line, 0) == [("F0.0", 0, 1), ("F0.1", 1, 2), ("B0.0", 4, 6), ("B0.1", 7, 9)]
    assert spans(line, 1) == [("F1.0", 1, 2), ("B1.0", 2, 4), ("F1.1", 4, 5), ("B1.1", 5, 7)]
    assert (line.seconds, line.busy(0), line.bubble, line.measured) == (9, 6, 0.5, False)
    assert line.inner_bubble == 0.5


def test_messages_take_time_between_ranks_only() -> None:
    schedule = parse_schedule("rank 0: F0.0\nrank 1: F1.0 F2.0\nrank 2: F3.0")
    assert timeline(schedule, message_time=0.25).seconds == 4.5
    assert spans(timeline(schedule, message_time=0.25), 1) == [("F1.0", 1.25, 2.25), ("F2.0", 2.25, 3.25)]


def test_a_slow_stage_holds_up_all() -> None:
    m = 6
    line = timeline(make_schedule("1f1b", 3, m), {(Kind.F, 1): 2.0, (Kind.B, 1): 4.0})
    assert line.seconds == 1 + m * 6 + 1 + 2  # F0, then stage 1, which waits once for stage 2, then B0
    assert line.bubble == pytest.approx((3 * 40 - 36 - 18 - 18) / 72)


def test_a_late_send_is_waited_for() -> None:
    schedule = parse_schedule("rank 0: F0.0 F0.1 SEND F0.0 -> 1 SEND F0.1 -> 1\nrank 1: F1.0 F1.1")
    assert spans(timeline(schedule), 1) == [("F1.0", 2, 3), ("F1.1", 3, 4)]


def test_links_that_skip_a_stage() -> None:
    """Stage 2 uses stage 0 alone: it need not wait for stage 1."""
    schedule = parse_schedule("rank 0: F0.0\nrank 1: F1.0\nrank 2: F2.0")
    value = chain(2)[0].values
    assert timeline(schedule).seconds == 3
    assert timeline(schedule, links=[Link(0, 1, value, value), Link(0, 2, value, value)]).seconds == 2


def test_what_waits_for_ever() -> None:
    schedule = parse_schedule("rank 0: F0.0 B0.0 F0.1 B0.1\nrank 1: F1.0 F1.1 B1.0 B1.1")
    with pytest.raises(ScheduleError, match="waits for ever: rank 0 for B1.0 -> 0, rank 1 for F0.1 -> 1"):
        timeline(schedule)


def test_peak_in_flight_lasts_until_the_weights_have_their_gradients() -> None:
    schedule = parse_schedule("rank 0: F0.0 I0.0 F0.1 W0.0 I0.1 W0.1 F0.2 B0.2")
    assert peak_in_flight(schedule.computes(0)) == 2


def test_measured_events_start_at_zero_in_the_order_of_time() -> None:
    events = [Event(1, Kind.F, 1, 0, 7.5, 8.0), Event(0, Kind.B, 0, 0, 8.5, 9.5), Event(0, Kind.F, 0, 0, 7.0, 7.5)]
    line = Timeline.of_events(events)
    assert spans(line, 0) == [("F0.0", 0, 0.5), ("B0.0", 1.5, 2.5)]
    assert spans(line, 1) == [("F1.0", 0.5, 1.0)]
    assert line.measured and line.bubble == pytest.approx((5 - 2) / 2)
    assert peak_in_flight(line.ranks[0]) == 1
    with pytest.raises(ValueError, match="at least one event"):
        Timeline.of_events([])
