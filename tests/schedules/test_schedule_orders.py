"""Each schedule, made by name: complete and free of deadlock at all sizes, with the bubble and memory of its paper."""

from __future__ import annotations

import cProfile
from collections.abc import Iterator

import pytest

from autopar.schedules.check import check_schedule
from autopar.schedules.instructions import Kind, Schedule, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule, stages_per_rank
from autopar.schedules.timing import peak_in_flight, timeline

TRAINING = [name for name in NAMES if name != "inference"]
SIZES = [(p, m) for p in (1, 2, 3, 4, 7) for m in sorted({1, 2, p, p + 1, 2 * p, 2 * p + 1, 5 * p - 1})]


def turns(name: str) -> tuple[int, ...]:
    only = NAMES[name].only
    return (1, 2, 3, 4) if only is None else (only,)


def peaks(schedule: Schedule) -> list[int]:
    return [peak_in_flight(schedule.computes(rank)) for rank in range(len(schedule.ranks))]


def checked(name: str, p: int, m: int, v: int, backward: bool = True) -> int:
    """Make it, check it; the functions that the check calls, which tells its work on a machine of any load."""
    links = chain(p * v)
    whole = with_messages(make_schedule(name, p, m, v, backward), links)
    profile = cProfile.Profile()
    profile.runcall(check_schedule, whole, links)
    return sum(entry.callcount for entry in profile.getstats())


def all_sizes(ranks: range, microbatches: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    return ((name, p, m, v) for name in NAMES for v in turns(name) for p in ranks for m in microbatches)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_accepted(name: str) -> None:
    for v in turns(name):
        for p, m in SIZES:
            checked(name, p, m, v)
        checked(name, 4, 9, v, backward=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_work_of_a_check_grows_with_the_instructions(name: str) -> None:
    v = max(turns(name))
    calls, half = checked(name, 16, 64, v), checked(name, 8, 64, v)
    print(f"{name:12} p=16 m=64 v={v}: checked with {calls} calls; p=8: {half}")
    assert calls < 2.5 * half  # twice the instructions, and the messages of a longer chain


@pytest.mark.slow
def test_all_up_to_16_ranks_and_64_microbatches() -> None:
    worst = max((checked(*sizes), sizes) for sizes in all_sizes(range(1, 17), (1, 2, 3, 5, 8, 13, 16, 31, 33, 63, 64)))
    print(f"the longest check: {worst[0]} calls, {worst[1]}")


@pytest.mark.parametrize("name", NAMES)
def test_bubble_equals_its_formula(name: str) -> None:
    tried = 0
    for v in turns(name):
        for p, m in SIZES:
            formula = NAMES[name].bubble.value(p, m, v)
            if formula is not None:
                assert timeline(make_schedule(name, p, m, v)).bubble == pytest.approx(formula, abs=1e-12), (p, m, v)
                tried += 1
    assert tried >= 12


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_gpipe_and_1f1b_idle_as_the_papers_say(p: int, m: int) -> None:
    for name in ("gpipe", "1f1b"):
        assert timeline(make_schedule(name, p, m, 1)).bubble == pytest.approx((p - 1) / m, abs=1e-12)
    for v in (1, 2, 3, 4):
        if m >= p:
            assert timeline(make_schedule("interleaved", p, m, v)).bubble == pytest.approx((p - 1) / (v * m), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_activations_in_flight(p: int, m: int) -> None:
    assert peaks(make_schedule("gpipe", p, m)) == [m] * p
    assert peaks(make_schedule("1f1b", p, m)) == [min(m, p - rank) for rank in range(p)]
    assert peaks(make_schedule("zb-h1", p, m)) == [min(m, p)] * p
    assert max(peaks(make_schedule("zb-v", p, m))) == 2 * min(m, p)  # of half the size: the memory of 1F1B
    assert max(peaks(make_schedule("dualpipe-v", p, m))) <= 2 * p + 1
    assert peaks(make_schedule("inference", p, m)) == [0] * p


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 2), (4, 16, 3), (8, 32, 2)])
def test_interleaved_holds_what_narayanan_says(p: int, m: int, v: int) -> None:
    found = peaks(make_schedule("interleaved", p, m, v))
    assert found == [(v - 1) * p + 2 * (p - 1 - rank) + 1 for rank in range(p)]


def test_in_flight_by_stage() -> None:
    def by_stage(schedule: Schedule) -> list[int]:
        homes = enumerate(schedule.placement)
        return [peak_in_flight([step for step in schedule.computes(at) if step.stage == own]) for own, at in homes]

    assert by_stage(make_schedule("1f1b", 3, 8)) == [3, 2, 1]
    assert by_stage(make_schedule("gpipe", 2, 5, 2)) == [5, 5, 5, 5]
    assert by_stage(make_schedule("zb-v", 2, 8)) == [4, 3, 2, 1]


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_zero_bubble(p: int) -> None:
    """ZB-H1 has a third of 1F1B's bubble; ZB-V none between the first and the last compute of any rank."""
    for m in (2 * p, 2 * p + 1, 4 * p):
        plain, h1, v = (timeline(make_schedule(name, p, m)) for name in ("1f1b", "zb-h1", "zb-v"))
        assert h1.bubble == pytest.approx(plain.bubble / 3, abs=1e-12)
        assert v.inner_bubble == 0
        assert v.bubble == pytest.approx(plain.bubble / 6, abs=1e-12)


def test_inference_is_forwards_only() -> None:
    made = make_schedule("inference", 3, 7, 2)
    assert {step.kind for rank in range(3) for step in made.computes(rank)} == {Kind.F}
    assert timeline(made).seconds == 7 * 2 + 2
    assert make_schedule("zb-v", 3, 7, backward=False).placement == make_schedule("zb-v", 3, 7).placement


def test_placement() -> None:
    assert make_schedule("interleaved", 3, 3, 2).placement == (0, 1, 2, 0, 1, 2)
    assert make_schedule("zb-v", 3, 3).placement == (0, 1, 2, 2, 1, 0)


def test_what_is_left_out() -> None:
    assert [stages_per_rank(name) for name in NAMES] == [1, 1, 2, 1, 2, 2, 1]
    assert make_schedule("interleaved", 2, 4).placement == (0, 1, 0, 1)
    assert make_schedule("interleaved", 4, 8, 1).ranks == make_schedule("1f1b", 4, 8).ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 4, 8), "there is no schedule '2f2b'; there are gpipe, 1f1b"),
        (("1f1b", 4, 8, 2), "schedule 1f1b has 1 stage per rank, not 2"),
        (
            ("zb-v", 4, 8, 1),
            "zb-v has 2 stages per rank, not 1\nWay out: leave the number out, or .*interleaved",
        ),
        (("gpipe", 0, 8), "schedule gpipe: 0 pipeline ranks; it takes at least 1"),
        (("gpipe", 2, 0), "schedule gpipe: 0 microbatches"),
        (("interleaved", 2, 2, 0), "0 stages per rank"),
    ],
)
def test_sizes_that_no_schedule_has(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)
