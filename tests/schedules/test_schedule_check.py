"""Planted faults: each is refused, in a few lines that name the instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from autopar.errors import ScheduleError
from autopar.schedules.check import check_computes, check_schedule
from autopar.schedules.instructions import Compute, Instruction, Link, Schedule, Values, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import make_schedule
from autopar.schedules.text import parse_schedule

HALF: Values = (((4, 8), torch.float16), ((4,), torch.int64))
GRADS: Values = (((4, 8), torch.float16),)
P, M = 3, 4


def links(values: Values = HALF, grads: Values = GRADS) -> tuple[Link, ...]:
    return tuple(replace(link, values=values, grads=grads) for link in chain(P))


def whole(name: str = "1f1b") -> Schedule:
    return with_messages(make_schedule(name, P, M), links())


def one(text: str) -> Instruction:
    _, step = parse_schedule(f"schedule one placement=0\nrank 0: F0.0 {text}").ranks[0]
    return step


def changed(rank: int, change: Callable[[list[Instruction]], object], name: str = "1f1b") -> Schedule:
    made = whole(name)
    steps = list(made.ranks[rank])
    change(steps)
    return replace(made, ranks=tuple(tuple(steps) if r == rank else own for r, own in enumerate(made.ranks)))


def drop(text: str) -> Callable[[list[Instruction]], object]:
    return lambda steps: steps.remove(one(text))


def swap(a: str, b: str) -> Callable[[list[Instruction]], object]:
    def change(steps: list[Instruction]) -> None:
        i, j = steps.index(one(a)), steps.index(one(b))
        steps[i], steps[j] = steps[j], steps[i]

    return change


def become(old: str, new: str) -> Callable[[list[Instruction]], object]:
    def change(steps: list[Instruction]) -> None:
        steps[steps.index(one(old))] = one(new)

    return change


def add(text: str, at: int = 10**6) -> Callable[[list[Instruction]], object]:
    return lambda steps: steps.insert(at, one(text))


FAULTS: dict[str, tuple[Schedule, str]] = {
    "sends of two microbatches swapped": (
        changed(0, swap("SEND F0.0 -> 1", "SEND F0.1 -> 1"), "gpipe"),
        "rank 0 has SEND F0.1 -> 1 before F0.1, which makes it",
    ),
    "sends swapped, both made before": (
        changed(1, lambda s: (s.remove(one("SEND F1.0 -> 2")), s.insert(s.index(one("F1.2")), one("SEND F1.0 -> 2")))),
        "message 1 from rank 1 to 2 is sent as F1.1 -> 2, received as F1.0 -> 2: post receives",
    ),
    "receives swapped": (
        changed(1, swap("RECV F0.0 -> 1", "RECV F0.1 -> 1")),
        "message 1 from rank 0 to 1 is sent as F0.0 -> 1, received as F0.1 -> 1",
    ),
    "no receive": (
        changed(2, drop("RECV F1.2 -> 2")),
        "rank 2 computes F2.2 and has no RECV F1.2 -> 2, which that needs",
    ),
    "no send": (changed(2, drop("SEND B2.1 -> 1")), "rank 2 computes B2.1 and has no SEND B2.1 -> 1"),
    "a send too many": (changed(0, add("SEND F0.1 -> 1")), "rank 0 sends F0.1 -> 1 twice"),
    "a receive too many": (changed(1, add("RECV F0.1 -> 1")), "rank 1 receives F0.1 -> 1 twice"),
    "the wrong peer": (
        changed(0, become("SEND F0.2 -> 1", "SEND F0.2 -> 2")),
        "rank 0 computes F0.2 and has no SEND F0.2 -> 1",
    ),
    "one more peer": (
        changed(0, add("SEND F0.2 -> 2")),
        "rank 0 has SEND F0.2 -> 2; what F0 makes goes to stage 1",
    ),
    "a receive from a stage that sends none": (
        changed(0, add("RECV B2.0 -> 0")),
        "rank 0 has RECV B2.0 -> 0; the gradient that B0 uses comes from stage 1",
    ),
    "a send to itself": (
        replace(whole(), placement=(0, 1, 1)),
        "rank 2 computes F2.0; stage 2 lies on rank 1",
    ),
    "a receive behind its use": (
        changed(1, lambda s: s.append(s.pop(s.index(one("RECV F0.3 -> 1"))))),
        "rank 1 has RECV F0.3 -> 1 behind F1.3, which would wait for it for ever",
    ),
    "a forward twice": (changed(1, add("F1.2")), "rank 1 computes F1.2 twice, as instruction"),
    "a forward never": (changed(1, drop("F1.2")), "rank 1 never computes F1.2"),
    "no backward": (changed(1, drop("B1.2")), "rank 1 computes F1.2, but neither B1.2 nor I1.2"),
    "no weight gradients": (
        changed(1, drop("W1.2"), "zb-h1"),
        "rank 1 computes I1.2 and never W1.2, the gradients of the weights",
    ),
    "weight gradients first": (
        changed(1, swap("W1.2", "I1.2"), "zb-h1"),
        "rank 1 computes W1.2 before I1.2, which it needs",
    ),
    "a whole backward and its half": (
        changed(1, add("I1.2")),
        "rank 1 computes B1.2 and I1.2: B1.2 is both I and W",
    ),
    "backward before forward": (changed(2, swap("F2.1", "B2.1")), "rank 2 computes B2.1 before F2.1, which it needs"),
    "on the wrong rank": (changed(1, become("F1.2", "F0.2")), "rank 1 computes F0.2; stage 0 lies on rank 0"),
    "a message on the wrong rank": (changed(1, add("SEND F0.2 -> 1")), "rank 1 has SEND F0.2 -> 1; stage 0 lies on"),
    "a microbatch too many": (changed(1, add("F1.4")), "rank 1 has F1.4; there are 4 microbatches"),
    "a stage too many": (changed(1, add("F3.0")), "rank 1 has F3.0; there are 3 stages"),
    "a peer that is no stage": (changed(1, add("SEND F1.0 -> 7")), "rank 1 has SEND F1.0 -> 7; there are 3 stages"),
    "a rank too many": (
        replace(whole(), placement=(0, 1, 3)),
        "stage 2 lies on rank 3; there are instructions of 3 ranks",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault: str) -> None:
    schedule, message = FAULTS[fault]
    check_schedule(whole(), links())
    with pytest.raises(ScheduleError) as refused:
        check_schedule(schedule, links())
    assert message in str(refused.value)
    assert str(refused.value).startswith("schedule ")
    assert len(str(refused.value).splitlines()) < 15


def test_a_deadlock_prints_the_circle() -> None:
    text = """
    rank 0: F0.0 B0.0 F0.1 B0.1
    rank 1: F1.0 F1.1 B1.0 B1.1"""
    schedule = with_messages(parse_schedule(text), chain(2))
    with pytest.raises(ScheduleError) as refused:
        check_schedule(schedule, chain(2))
    assert str(refused.value).splitlines() == [
        "schedule custom: 2 ranks wait for each other for ever",
        "  rank 0 stands at B0.0, which needs B1.0 -> 0; rank 1 has that behind F1.1",
        "  rank 1 stands at F1.1, which needs F0.1 -> 1; rank 0 has that behind B0.0",
    ]


def test_sends_that_wait_too_long() -> None:
    """The computes alone are in order; each rank sends only after it has waited for the other."""
    text = """
    rank 0: RECV F1.0 -> 2 F0.0 F2.0 SEND F0.0 -> 3
    rank 1: RECV F0.0 -> 3 F1.0 F3.0 SEND F1.0 -> 2"""
    schedule = parse_schedule(text)
    value = chain(2)[0].values
    with pytest.raises(ScheduleError, match="2 ranks wait for each other for ever") as refused:
        check_schedule(schedule, [Link(0, 3, value, ()), Link(1, 2, value, ())])
    assert "rank 0 stands at F2.0, which needs F1.0 -> 2; rank 1 has that behind F3.0" in str(refused.value)


def test_a_long_circle_is_cut_short() -> None:
    """16 ranks, each of which waits for the one before it; rank 0 for the last, whose turn comes too late."""
    p = 16
    ranks = [
        tuple(Compute(step.kind, step.stage, 1 - step.microbatch if rank == 0 else step.microbatch) for step in steps)
        for rank, steps in enumerate([[*make_schedule("gpipe", p, 2).computes(r)] for r in range(p)])
    ]
    first = [step for step in ranks[0] if step.microbatch == 0]
    ranks[0] = (*first, *(step for step in ranks[0] if step.microbatch == 1))
    ranks[p - 1] = (*sorted(ranks[p - 1], key=lambda step: (step.kind.value == "B", step.microbatch)),)
    schedule = with_messages(replace(make_schedule("gpipe", p, 2), ranks=tuple(ranks)), chain(p))
    with pytest.raises(ScheduleError, match="wait for each other for ever") as refused:
        check_schedule(schedule, chain(p))
    assert len(str(refused.value).splitlines()) < 15


def test_a_rank_that_waits_for_itself() -> None:
    schedule = parse_schedule("rank 0: F1.0 F0.0")
    with pytest.raises(ScheduleError, match="rank 0 computes F1.0 before what makes F0.0 -> 1, which it needs"):
        check_schedule(schedule, chain(2))


@pytest.mark.parametrize(
    ("values", "grads", "message"),
    [
        ((((4, 8), torch.bfloat16), HALF[1]), GRADS, r"F0.0 -> 1 is float16\[4,8\] where rank 0 sends it and bfloat16"),
        ((((4, 9), torch.float16), HALF[1]), GRADS, r"float16\[4,9\] where rank 1 receives it \(tensor 0 of 2\)"),
        ((HALF[0],), GRADS, "F0.0 -> 1 is 2 tensors where rank 0 sends it and 1 where rank 1 receives it"),
        (
            HALF,
            (((4, 8), torch.float32),),
            r"B1.0 -> 0 is float32\[4,8\] where rank 1 sends it and float16\[4,8\] where",
        ),
    ],
)
def test_both_ends_mean_the_same_tensors(values: Values, grads: Values, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_schedule(whole(), [links(), links(values, grads), links()])


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ([links()] * 2, "links of 2 ranks for a schedule of 3 ranks"),
        ([*links(), links()[0]], "two links 0 -> 1"),
        ([*links(), Link(1, 7, HALF, GRADS)], "a link 1 -> 7 between 3 stages"),
        (
            [links(), links()[1:], links()],
            "rank 1 has SEND B1.0 -> 0; the gradient that B1 makes goes to no other stage",
        ),
        ([*links()[1:]], "rank 0 has SEND F0.0 -> 1; what F0 makes goes to no other stage"),
        ([links(), links(), links()[:1]], "rank 2 has SEND B2.0 -> 1; the gradient that B2 makes goes to no other"),
        ([*links(), Link(0, 2, HALF, GRADS)], "rank 0 computes F0.0 and has no SEND F0.0 -> 2"),
    ],
)
def test_links_that_do_not_fit(seen: Sequence[Link], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_schedule(whole(), seen)


def test_a_message_between_stages_of_one_rank() -> None:
    with pytest.raises(ScheduleError, match="rank 0 has SEND F0.0 -> 1; both stages lie on it"):
        check_schedule(parse_schedule("rank 0: F0.0 SEND F0.0 -> 1 F1.0"), chain(2))


def test_messages_are_activations_or_gradients() -> None:
    schedule = changed(0, lambda steps: steps.append(replace(one("SEND F0.0 -> 1"), kind=one("W0.0").kind)))  # type: ignore
    with pytest.raises(ScheduleError, match="rank 0 has SEND W0.0 -> 1; messages are F, activations, or B, gradients"):
        check_schedule(schedule, links())


def test_too_many_in_flight() -> None:
    check_schedule(whole(), links(), in_flight_limit=P)
    check_schedule(whole(), links(), in_flight_limit=[3, 2, 1])
    check_schedule(whole("gpipe"), links(), in_flight_limit=M)
    message = "schedule gpipe: rank 0 holds the activations of 4 forwards, 3 are allowed; it starts with 4 F, 4 B"
    with pytest.raises(ScheduleError, match=message):
        check_schedule(whole("gpipe"), links(), in_flight_limit=P)
    with pytest.raises(ScheduleError, match="rank 1 holds the activations of 2 forwards, 1 are allowed"):
        check_schedule(whole(), links(), in_flight_limit=[3, 1, 1])
    with pytest.raises(ScheduleError, match="2 limits in flight for 3 ranks"):
        check_schedule(whole(), links(), in_flight_limit=[3, 1])


def test_computes_are_checked_before_messages_are_there() -> None:
    check_computes(make_schedule("zb-v", 2, 5))
    with pytest.raises(ScheduleError, match="rank 1 never computes F1.1"):
        check_computes(parse_schedule("rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0"))
