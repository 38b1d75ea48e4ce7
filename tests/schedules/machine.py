"""Ranks that run a schedule with messages, in an order that the test chooses: what a check has promised, tried out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from autopar.schedules.instructions import Compute, Flow, Link, Message, Schedule, Send


class WrongData(Exception):
    """A rank got another message than the one it had posted a receive for."""


class StandsStill(Exception):
    """No rank can go on."""


def run_on_machine(schedule: Schedule, links: Sequence[Link], choose: Callable[[Sequence[int]], int]) -> None:
    """Sends and receives never block; a channel hands the k-th message sent to the k-th receive posted; a compute waits
    for its messages. ``choose`` picks which of the ranks that can go on goes on."""
    flow = Flow(len(schedule.placement), links)
    position = [0] * len(schedule.ranks)
    sent: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
    posted: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
    there: list[set[Message]] = [set() for _ in schedule.ranks]

    def can_go_on(rank: int) -> bool:
        if position[rank] == len(schedule.ranks[rank]):
            return False
        step = schedule.ranks[rank][position[rank]]
        return not isinstance(step, Compute) or all(message in there[rank] for message in flow.needs(step))

    while True:
        ready = [rank for rank in range(len(schedule.ranks)) if can_go_on(rank)]
        if not ready:
            break
        rank = choose(ready)
        step = schedule.ranks[rank][position[rank]]
        position[rank] += 1
        if isinstance(step, Compute):
            there[rank] |= {m for m in flow.makes(step) if schedule.placement[m.target] == rank}
            continue
        channel = schedule.placement[step.message.source], schedule.placement[step.message.target]
        (sent if isinstance(step, Send) else posted)[channel].append(step.message)
        while sent[channel] and posted[channel]:
            arrived, expected = sent[channel].popleft(), posted[channel].popleft()
            if arrived != expected:
                raise WrongData(f"{arrived} instead of {expected}")
            there[channel[1]].add(arrived)
    if any(position[rank] < len(steps) for rank, steps in enumerate(schedule.ranks)):
        raise StandsStill(str(position))
    if any(sent.values()) or any(posted.values()):
        raise WrongData("messages are left")
