"""Insert sends and receives into a schedule of computes.

    rank 0: F0.0 B0.0    -->    RECV B1.0 -> 0 F0.0 SEND F0.0 -> 1 B0.0
    rank 1: F1.0 B1.0    -->    RECV F0.0 -> 1 F1.0 B1.0 SEND B1.0 -> 0

A send follows immediately after the compute that makes its message. A receive is posted one compute ahead of its use.
It is posted earlier where the sender sends it before a message that is used earlier: receives of one channel (all that
one rank sends to another) are posted in the order of the sends; and where ranks would otherwise wait for each other in
sends that wait for their receivers (:mod:`autopar.schedules.rendezvous`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from autopar.errors import ScheduleError
from autopar.schedules.instructions import Flow, Instruction, Link, Message, Receive, Schedule, Send
from autopar.schedules.rendezvous import with_early_posts


def with_messages(schedule: Schedule, links: Sequence[Link]) -> Schedule:
    """``schedule``, which holds computes only, with the messages of ``links`` between stages of different ranks.

    Raises ScheduleError where it holds messages already, or where a message has no compute that makes or uses it.
    """
    if schedule.has_messages:
        raise ScheduleError(f"{schedule.title} holds sends and receives already: nothing to insert")
    flow, lists = (
        Flow(len(schedule.placement), links),
        [tuple(schedule.computes(r)) for r in range(len(schedule.ranks))],
    )
    sends = [[_crossing(schedule, flow.makes(step)) for step in steps] for steps in lists]
    coming: list[dict[int, list[Message]]] = [defaultdict(list) for _ in lists]  # by receiver and sender, in order
    for rank, behind in enumerate(sends):
        for message in chain.from_iterable(behind):
            coming[schedule.placement[message.target]][rank].append(message)
    ranks = []
    for rank, steps in enumerate(lists):
        uses = [_crossing(schedule, flow.needs(step)) for step in steps]
        posts = _posts(f"{schedule.title}: rank {rank}", uses, coming[rank].values())
        merged: list[Instruction] = []
        for position, step in enumerate(steps):
            merged += [Receive(m.kind, m.target, m.microbatch, m.source) for m in posts[position]]
            merged.append(step)
            merged += [Send(m.kind, m.source, m.microbatch, m.target) for m in sends[rank][position]]
        ranks.append(tuple(merged))
    return with_early_posts(replace(schedule, ranks=tuple(ranks)), flow)


def _crossing(schedule: Schedule, messages: Iterable[Message]) -> list[Message]:
    return [m for m in messages if schedule.placement[m.source] != schedule.placement[m.target]]


def _posts(title: str, uses: Sequence[Sequence[Message]], coming: Iterable[Sequence[Message]]) -> list[list[Message]]:
    """The receives to post before each compute of a rank. ``uses``: what each compute needs; ``coming``: what is sent
    to the rank, by each other rank in order."""
    wanted = {message: max(0, position - 1) for position, needed in enumerate(uses) for message in needed}
    posts: list[list[Message]] = [[] for _ in uses]
    for channel in coming:
        latest, placed = len(uses), []
        for message in reversed(channel):
            if message not in wanted:
                raise ScheduleError(f"{title} is sent {message} and never uses it")
            latest = min(latest, wanted.pop(message))
            placed.append((latest, message))
        for position, message in reversed(placed):
            posts[position].append(message)
    for message in wanted:
        raise ScheduleError(f"{title} needs {message}, which nothing makes")
    return posts
