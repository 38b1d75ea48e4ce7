"""The times of a schedule: when each compute starts and ends, how long ranks idle, how many activations they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autopar.errors import ScheduleError
from autopar.schedules.instructions import FREES, Compute, Flow, Kind, Link, Message, Schedule, Send, chain
from autopar.schedules.walk import walk

UNITS = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0}


@dataclass(frozen=True, slots=True)
class Event:
    """One compute of one rank, from ``start_s`` to ``end_s``, in seconds or in units of one forward."""

    rank: int
    kind: Kind
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The computes of all ranks in time; those of each rank in the order of their starts."""

    ranks: tuple[tuple[Event, ...], ...]
    measured: bool = False  # in seconds, by a clock

    @classmethod
    def of_events(cls, events: Iterable[Event]) -> Timeline:
        """The timeline of measured events, by any clock that all ranks share.

        Raises ValueError where there are none.
        """
        ordered = sorted(events, key=lambda event: (event.rank, event.start_s, event.end_s))
        if not ordered:
            raise ValueError("a timeline needs at least one event")
        first = min(event.start_s for event in ordered)
        ranks: list[list[Event]] = [[] for _ in range(ordered[-1].rank + 1)]
        for e in ordered:
            ranks[e.rank].append(Event(e.rank, e.kind, e.stage, e.microbatch, e.start_s - first, e.end_s - first))
        return cls(tuple(tuple(events) for events in ranks), measured=True)

    @property
    def seconds(self) -> float:
        """The time from the first start to the last end on any rank."""
        return max((events[-1].end_s for events in self.ranks if events), default=0.0)

    def busy(self, rank: int) -> float:
        return sum(event.end_s - event.start_s for event in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """Idle time over computing time of all ranks together, where a step starts and ends for all of them at once."""
        busy = sum(self.busy(rank) for rank in range(len(self.ranks)))
        return (len(self.ranks) * self.seconds - busy) / busy

    @property
    def inner_bubble(self) -> float:
        """Idle time over computing time of the worst rank, between its own first start and last end.

        This is the idle time that is left where ranks need not wait for each other between steps: the zero in "zero
        bubble" (Qi et al. 2023, section 4).
        """
        spans = [(events[-1].end_s - events[0].start_s, self.busy(r)) for r, events in enumerate(self.ranks) if events]
        return max((span - busy) / busy for span, busy in spans)


def timeline(
    schedule: Schedule,
    durations: Mapping[tuple[Kind, int], float] | None = None,
    message_time: float = 0.0,
    links: Sequence[Link] | None = None,
) -> Timeline:
    """Each compute starts when the one before it on its rank has ended and its messages have arrived.

    ``durations`` by (kind, stage); missing ones are F=1, B=2, I=1, W=1. A message between ranks takes ``message_time``
    from its send; where the schedule has no sends, from the end of the compute that makes it.
    ``links``: None stands for those of a plain pipeline.
    Raises ScheduleError where the schedule waits for ever (``check_schedule`` says why).
    """
    stages, placement = len(schedule.placement), schedule.placement
    flow = Flow(stages, chain(stages) if links is None else links)
    order, stuck = walk(schedule, [flow] * len(schedule.ranks))
    if stuck:
        who = ", ".join(f"rank {rank} for {message}" for rank, (_, message) in sorted(stuck.items()))
        raise ScheduleError(f"{schedule.title} waits for ever: {who}")
    seconds = {(kind, stage): unit for kind, unit in UNITS.items() for stage in range(stages)} | dict(durations or {})
    made: dict[Message, float] = {}
    clock = [0.0] * len(schedule.ranks)
    events: list[list[Event]] = [[] for _ in schedule.ranks]
    for rank, step in order:
        if isinstance(step, Send):
            made[step.message] = clock[rank] + message_time
        elif isinstance(step, Compute):
            start = max(clock[rank], *(made[message] for message in flow.needs(step)), 0.0)
            clock[rank] = end = start + seconds[step.kind, step.stage]
            events[rank].append(Event(rank, step.kind, step.stage, step.microbatch, start, end))
            for message in flow.makes(step):
                made[message] = end + (message_time if placement[message.target] != rank else 0.0)
    return Timeline(tuple(tuple(own) for own in events))


def peak_in_flight(steps: Iterable[Compute | Event]) -> int:
    """The most (stage, microbatch) pairs of one rank whose activations are held: from F to the end of B, or of W.

    It is 0 without any backward: nothing is kept then.
    """
    held = most = freed = 0
    for step in steps:
        if step.kind is Kind.F:
            held += 1
            most = max(most, held)
        elif step.kind in FREES:
            held -= 1
            freed += 1
    return most if freed else 0
