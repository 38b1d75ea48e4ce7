"""Whether ranks can wait for each other for ever: all of them walk through their events together.

A collective goes on once each member of its group stands at it, and all must mean the same one. A compute goes on once
its messages have come. These rules have one outcome whatever the timing (no rank chooses between what comes first), so
one walk speaks for all timings: if it ends, no run of these programs hangs.

It is done twice: with sends that leave at once, as autopar's do, and with sends that wait until the receiver has posted
its memory, as large ones do where a transport has no room of its own.

A start of a collective counts as the collective itself: with one stream a communicator, as NCCL has, ranks that start
in another order may hang although each waits later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from autopar.mesh import PIPELINE, Mesh
from autopar.proof.rank_events import Collective, Event, Posting, Sending, Taking
from autopar.proof.refusal import Layer, Refusal
from autopar.schedules.instructions import Message

MOST_OF_A_CIRCLE = 8  # ranks printed

Group = tuple[str, tuple[int, ...]]  # an axis and the members
Key = tuple[tuple[int, ...], Message]  # the ranks of a line, and a message among them


def check_order(events: Sequence[Sequence[Event]], mesh: Mesh) -> Iterator[Refusal]:
    """Refuse ranks that would wait for ever, or issue collectives that do not match; ``events``: of each rank."""
    for blocking in (False, True):
        walk = _Walk(events, mesh, blocking)
        refused = list(walk.run())
        yield from refused
        if refused:
            return


def _groups(events: Sequence[Sequence[Event]], mesh: Mesh) -> dict[tuple[str, int], Group]:
    """(axis, rank) -> the group of the rank there."""
    axes = {event.axis for own in events for event in own if isinstance(event, Collective)}
    return {(axis, rank): (axis, members) for axis in axes for members in mesh.groups(axis) for rank in members}


class _Walk:
    """All ranks, each as far as it can go. A message belongs to the ranks that differ on ``pp`` only: a line."""

    def __init__(self, events: Sequence[Sequence[Event]], mesh: Mesh, blocking: bool) -> None:
        self.events, self.blocking = events, blocking
        self.groups = _groups(events, mesh)
        self.lines = [
            tuple(mesh.group(rank, PIPELINE)) if mesh.is_pipelined else (rank,) for rank in range(len(events))
        ]
        self.at = [0] * len(events)
        self.standing: dict[Group, set[int]] = defaultdict(set)  # ranks that stand at a collective of a group
        self.done: Counter[Group] = Counter()
        self.sent: dict[Key, int] = {}  # the rank that has sent a message
        self.posted: dict[Key, int] = {}  # ... that has memory for it
        self.waiting: dict[Key, int] = {}  # message -> the rank that needs it sent, or its memory posted

    def run(self) -> Iterator[Refusal]:
        todo = list(range(len(self.events)))[::-1]
        while todo:
            rank = todo.pop()
            while self.at[rank] < len(self.events[rank]):
                event = self.events[rank][self.at[rank]]
                if isinstance(event, Collective):
                    group = self.groups[event.axis, rank]
                    self.standing[group].add(rank)
                    if len(self.standing[group]) < len(group[1]):
                        break
                    met = sorted(self.standing.pop(group))
                    if (refusal := self._unlike(group, met)) is not None:
                        yield refusal
                        return
                    self.done[group] += 1
                    for member in met:
                        self.at[member] += 1
                    todo += [member for member in met if member != rank]
                    continue
                key = self.lines[rank], event.message
                if not self._passes(rank, event, key, todo):
                    self.waiting[key] = rank
                    break
                self.at[rank] += 1
        if any(position < len(own) for position, own in zip(self.at, self.events)):
            yield self._circle()
        else:
            yield from self._left_over()

    def _passes(self, rank: int, event: Sending | Posting | Taking, key: Key, todo: list[int]) -> bool:
        """Whether a rank goes on after ``event``; those that it wakes join ``todo``."""
        if isinstance(event, Taking):
            return key in self.sent
        (self.sent if isinstance(event, Sending) else self.posted)[key] = rank
        if key in self.waiting:
            todo.append(self.waiting.pop(key))
        return isinstance(event, Posting) or not self.blocking or key in self.posted

    def _left_over(self) -> Iterator[Refusal]:
        """Messages that nobody takes, and memory for those that nobody sends."""
        cause = "one rank has more messages in a step than the other, or another one"
        for key, rank in self.sent.items():
            if key not in self.posted:
                yield Refusal(Layer.STRUCTURE, f"rank {rank}", f"it sends {key[1]}, which nobody receives", cause)
        for key, rank in self.posted.items():
            if key not in self.sent:
                yield Refusal(Layer.STRUCTURE, f"rank {rank}", f"it receives {key[1]}, which nobody sends", cause)

    def _unlike(self, group: Group, met: Sequence[int]) -> Refusal | None:
        """The refusal of members that mean other collectives."""
        found = {rank: self.events[rank][self.at[rank]] for rank in met}
        first = min(met)
        other = next((rank for rank in sorted(met) if _tag(found[rank]) != _tag(found[first])), None)
        number = f"collective {self.done[group] + 1} of ranks {_ranks(group[1])} over {group[0]}"
        if other is None:
            return self._swapped(number, found)
        problem = f"rank {first} issues {found[first]}, rank {other} issues {found[other]}"
        cause = "one of them leaves a collective out, or has it twice, in another order, of another size or op"
        return Refusal(Layer.STRUCTURE, number, problem, cause, (first, other))

    def _swapped(self, number: str, found: Mapping[int, Event]) -> Refusal | None:
        """The refusal of members whose operands belong to other collectives: they do not hang, and add other things."""
        first = min(found)
        for other, event in sorted(found.items()):
            one, two = _collective(found[first]), _collective(event)
            elsewhere = {each.operand for each in self.events[first] if isinstance(each, Collective)}
            if one.operand != two.operand and two.operand in elsewhere:
                problem = f"rank {first} sends '{one.name}' in {one}, rank {other} sends '{two.name}' in {two}: of one "
                cause = "the code of one rank has two collectives of one size in another order"
                return Refusal(Layer.STRUCTURE, number, f"{problem}size, and not the same value", cause, (first, other))
        return None

    def _circle(self) -> Refusal:
        """The ranks that wait for each other; or for one that has ended."""
        path: list[int] = []
        rank = next(rank for rank, own in enumerate(self.events) if self.at[rank] < len(own))
        while rank not in path and self.at[rank] < len(self.events[rank]):
            path.append(rank)
            rank = self._awaited(rank)
        if self.at[rank] >= len(self.events[rank]):
            event = self.events[path[-1]][self.at[path[-1]]]
            problem = f"rank {path[-1]} waits at {event} for rank {rank}, which has ended"
            cause = "one rank issues a collective, or expects a message, that the other does not"
            return Refusal(Layer.STRUCTURE, f"rank {path[-1]}", problem, cause, (path[-1], rank))
        path = path[path.index(rank) :]
        lines = [
            f"rank {here} stands at {self.events[here][self.at[here]]}, and waits for rank {self._awaited(here)}"
            for here in path
        ]
        if len(lines) > MOST_OF_A_CIRCLE:
            half = MOST_OF_A_CIRCLE // 2
            lines[half:-half] = [f"... {len(lines) - 2 * half} more ranks ..."]
        how = "wait for each other for ever" + (" where a send waits for its receiver" if self.blocking else "")
        problem = "".join(f"\n      {line}" for line in lines)
        cause = "a rank does these things in another order than the others, or waits before it makes what they need"
        if self.blocking:
            cause = "a receive is posted behind a send: post it before the send that the other rank waits in"
        return Refusal(Layer.STRUCTURE, f"{len(path)} ranks", f"{how}:{problem}", cause, tuple(path[:2]))

    def _awaited(self, rank: int) -> int:
        """A rank for which ``rank`` waits where it stands."""
        event = self.events[rank][self.at[rank]]
        if isinstance(event, Collective):
            group = self.groups[event.axis, rank]
            here = self.standing[group]
            return next(member for member in group[1] if member not in here)
        return self.lines[rank][event.place]


def _collective(event: Event) -> Collective:
    assert isinstance(event, Collective)
    return event


def _tag(event: Event) -> str:
    return _collective(event).tag


def _ranks(members: Sequence[int]) -> str:
    shown = ", ".join(map(str, members[:MOST_OF_A_CIRCLE]))
    return shown + (f" and {len(members) - MOST_OF_A_CIRCLE} more" if len(members) > MOST_OF_A_CIRCLE else "")
