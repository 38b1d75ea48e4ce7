"""Insert sends and receives into a schedule of computes.

    rank 0: F0.0 B0.0    -->    F0.0 SEND F0.0 -> 1 RECV B1.0 -> 0 B0.0
    rank 1: F1.0 B1.0    -->    RECV F0.0 -> 1 F1.0 B1.0 SEND B1.0 -> 0

A send stands right behind the compute that makes its message. A receive is posted one compute ahead of its use, or
earlier where the sender sends it before something that is used earlier: receives of one channel (all that one rank
sends to another) are posted in the order of the sends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from autopar.errors import ScheduleError
from autopar.instructions import Compute, Flow, Instruction, Link, Message, Receive, Schedule, Send


def with_messages(schedule: Schedule, links: Sequence[Link]) -> Schedule:
    """``schedule``, which holds computes only, with the messages of ``links`` between stages of different ranks.

    Raises ScheduleError where it holds messages already, or where a message has no compute that makes or uses it.
    """
    if schedule.has_messages:
        raise ScheduleError(f"{schedule.title} holds sends and receives already: nothing to insert")
    flow, placement = Flow(len(schedule.placement), links), schedule.placement
    sends = [_sends(tuple(schedule.computes(rank)), flow, placement) for rank in range(len(schedule.ranks))]
    ranks = []
    for rank in range(len(schedule.ranks)):
        steps = tuple(schedule.computes(rank))
        posts = _posts(rank, steps, sends, flow, placement, schedule.title)
        merged: list[Instruction] = []
        for position, step in enumerate(steps):
            merged += [Receive(m.kind, m.target, m.microbatch, m.source) for m in posts[position]]
            merged.append(step)
            merged += [Send(m.kind, m.source, m.microbatch, m.target) for m in sends[rank][position]]
        ranks.append(tuple(merged))
    return replace(schedule, ranks=tuple(ranks))


def _sends(steps: Sequence[Compute], flow: Flow, placement: Sequence[int]) -> list[list[Message]]:
    """For each compute of a rank the messages that leave the rank behind it."""
    return [[m for m in flow.makes(step) if placement[m.source] != placement[m.target]] for step in steps]


def _posts(
    rank: int,
    steps: Sequence[Compute],
    sends: Sequence[Sequence[Sequence[Message]]],
    flow: Flow,
    placement: Sequence[int],
    title: str,
) -> list[list[Message]]:
    """For each compute of ``rank`` the receives to post before it."""
    wanted = {
        message: max(0, position - 1)
        for position, step in enumerate(steps)
        for message in flow.needs(step)
        if placement[message.source] != rank
    }
    posts: list[list[Message]] = [[] for _ in steps]
    coming: dict[int, list[Message]] = defaultdict(list)
    for peer, behind in enumerate(sends):
        coming[peer] = [m for messages in behind for m in messages if placement[m.target] == rank]
    for channel in coming.values():
        latest, placed = len(steps), []
        for message in reversed(channel):
            if message not in wanted:
                raise ScheduleError(f"{title}: {message} is sent to rank {rank}, which never uses it")
            latest = min(latest, wanted.pop(message))
            placed.append((latest, message))
        for position, message in reversed(placed):
            posts[position].append(message)
    for message in wanted:
        raise ScheduleError(f"{title}: nothing makes {message}, which rank {rank} waits for")
    return posts
