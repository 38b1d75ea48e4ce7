"""The check of messages: each send has its one receive, between the right ranks, alike on both sides, in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from autopar.errors import ScheduleError
from autopar.schedules.instructions import Compute, Flow, Kind, Link, Message, Receive, Schedule, Send, Values

Channel = tuple[int, int]  # ranks: from, to
Places = dict[Message, tuple[int, int]]  # (rank, position in its list)


def check_messages(schedule: Schedule, links: Sequence[Sequence[Link]]) -> None:
    """Check all messages of a schedule. Raises ScheduleError for the first that is wrong.

    ``links``: one sequence per rank, the links that this rank knows.
    """
    flows = [Flow(len(schedule.placement), own) for own in links]
    sends, receives = _places(schedule, Send), _places(schedule, Receive)
    _check_sends(schedule, flows, sends)
    _check_receives(schedule, flows, receives)
    for message, (rank, _) in sends.items():
        if message not in receives:
            to = schedule.placement[message.target]
            raise ScheduleError(f"{schedule.title}: rank {rank} sends {message}, and rank {to} has no RECV {message}")
    for message, (rank, _) in receives.items():
        if message not in sends:
            source = schedule.placement[message.source]
            raise ScheduleError(
                f"{schedule.title}: rank {rank} receives {message}, and rank {source} has no SEND {message}"
            )
    _check_types(schedule, links, sends)
    _check_order(schedule, sends, receives)


def _places(schedule: Schedule, which: type[Send] | type[Receive]) -> Places:
    """The place at which each message is sent, or received."""
    places: Places = {}
    verb = "sends" if which is Send else "receives"
    for rank, steps in enumerate(schedule.ranks):
        for position, step in enumerate(steps):
            if not isinstance(step, which):
                continue
            message, home = step.message, schedule.placement[step.stage]
            if step.kind not in (Kind.F, Kind.B):
                raise ScheduleError(
                    f"{schedule.title}: rank {rank} has {step}; messages are F, activations, or B, gradients"
                )
            if home != rank:
                raise ScheduleError(f"{schedule.title}: rank {rank} has {step}; stage {step.stage} lies on rank {home}")
            if schedule.placement[step.peer] == rank:
                raise ScheduleError(
                    f"{schedule.title}: rank {rank} has {step}; both stages lie on it, so that nothing is to be sent"
                )
            if message in places:
                raise ScheduleError(f"{schedule.title}: rank {rank} {verb} {message} twice")
            places[message] = (rank, position)
    return places


def _check_sends(schedule: Schedule, flows: Sequence[Flow], sends: Places) -> None:
    """Each rank sends what its computes produce for other ranks, after the compute, and nothing else."""
    due = _crossing(schedule, flows, Flow.makes)
    for message, (rank, position) in due.items():
        maker = schedule.ranks[rank][position]
        if message not in sends:
            raise ScheduleError(f"{schedule.title}: rank {rank} computes {maker} and has no SEND {message}")
        if sends[message][1] < position:
            raise ScheduleError(f"{schedule.title}: rank {rank} has SEND {message} before {maker}, which makes it")
    for message, (rank, _) in sends.items():
        if message not in due:
            flow, stage = flows[rank], message.source
            peers = flow.after[stage] if message.kind is Kind.F else flow.returned[stage]
            raise ScheduleError(
                f"{schedule.title}: rank {rank} has SEND {message}; {_partners(message, stage, 'goes to', peers)}"
            )


def _check_receives(schedule: Schedule, flows: Sequence[Flow], receives: Places) -> None:
    """Each rank receives what its computes need from other ranks, posted before the compute, and nothing else."""
    due = _crossing(schedule, flows, Flow.needs)
    for message, (rank, position) in due.items():
        user = schedule.ranks[rank][position]
        if message not in receives:
            raise ScheduleError(
                f"{schedule.title}: rank {rank} computes {user} and has no RECV {message}, which that needs"
            )
        if receives[message][1] > position:
            raise ScheduleError(
                f"{schedule.title}: rank {rank} has RECV {message} behind {user}, which would wait for it for ever"
            )
    for message, (rank, _) in receives.items():
        if message not in due:
            flow, stage = flows[rank], message.target
            peers = flow.before[stage] if message.kind is Kind.F else flow.returns[stage]
            raise ScheduleError(
                f"{schedule.title}: rank {rank} has RECV {message}; {_partners(message, stage, 'comes from', peers)}"
            )


def _crossing(
    schedule: Schedule, flows: Sequence[Flow], messages: Callable[[Flow, Compute], Iterable[Message]]
) -> Places:
    """The messages between ranks that the computes make, or need, and the place of that compute."""
    placement = schedule.placement
    return {
        message: (rank, position)
        for rank, steps in enumerate(schedule.ranks)
        for position, step in enumerate(steps)
        if isinstance(step, Compute)
        for message in messages(flows[rank], step)
        if placement[message.source] != placement[message.target]
    }


def _partners(message: Message, stage: int, verb: str, peers: Sequence[int]) -> str:
    what = f"what F{stage} makes" if message.kind is Kind.F else f"the gradient that B{stage} makes"
    if verb == "comes from":
        what = f"what F{stage} uses" if message.kind is Kind.F else f"the gradient that B{stage} uses"
    return f"{what} {verb} {'stage ' + ', '.join(map(str, sorted(peers))) if peers else 'no other stage'}"


def _check_types(schedule: Schedule, links: Sequence[Sequence[Link]], sends: Places) -> None:
    """Both ends of a link expect the same tensors."""
    tables = [{(link.source, link.target): link for link in own} for own in links]
    checked: set[tuple[Kind, int, int]] = set()
    for message, (rank, _) in sends.items():
        if (message.kind, message.source, message.target) in checked:
            continue
        checked.add((message.kind, message.source, message.target))
        ends = (message.source, message.target) if message.kind is Kind.F else (message.target, message.source)
        to = schedule.placement[message.target]
        sent, got = (
            table[ends].values if message.kind is Kind.F else table[ends].grads for table in (tables[rank], tables[to])
        )
        if sent != got:
            raise ScheduleError(
                f"{schedule.title}: {message} is {_difference(sent, got, rank, to)}; "
                "both ends have to be made for one microbatch of the same sizes"
            )


def _difference(sent: Values, got: Values, rank: int, to: int) -> str:
    if len(sent) != len(got):
        return f"{len(sent)} tensors where rank {rank} sends it and {len(got)} where rank {to} receives it"
    number = next(i for i, (a, b) in enumerate(zip(sent, got)) if a != b)
    which = f" (tensor {number} of {len(sent)})" if len(sent) > 1 else ""
    return (
        f"{_type(sent[number])} where rank {rank} sends it and {_type(got[number])} where rank {to} receives it{which}"
    )


def _type(value: tuple[tuple[int, ...], object]) -> str:
    shape, dtype = value
    return f"{str(dtype).removeprefix('torch.')}[{','.join(map(str, shape))}]"


def _check_order(schedule: Schedule, sends: Places, receives: Places) -> None:
    """Messages between two ranks arrive in the order of the sends, so the receives must be posted in that order."""
    posted = _channels(schedule, receives)
    for (rank, to), sent in _channels(schedule, sends).items():
        for number, (a, b) in enumerate(zip(sent, posted[rank, to])):
            if a != b:
                raise ScheduleError(
                    f"{schedule.title}: message {number + 1} from rank {rank} to {to} is sent as {a}, received as {b}: "
                    "post receives in the order of the sends"
                )


def _channels(schedule: Schedule, places: Places) -> dict[Channel, list[Message]]:
    """The messages of each pair of ranks, in the order in which ``places`` has their sends, or their receives."""
    channels: dict[Channel, list[Message]] = defaultdict(list)
    for message in places:
        channels[schedule.placement[message.source], schedule.placement[message.target]].append(message)
    return channels
