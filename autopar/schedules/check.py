"""Refuse a schedule that would go wrong, before anything runs: its computes, its messages, and who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from autopar.errors import ScheduleError
from autopar.schedules.check_messages import check_messages
from autopar.schedules.instructions import Compute, Flow, Kind, Link, Schedule
from autopar.schedules.timing import peak_in_flight
from autopar.schedules.walk import Stuck, walk

MOST_RANKS_OF_A_CYCLE = 8  # printed, one line each


def check_schedule(
    schedule: Schedule,
    links: Sequence[Link] | Sequence[Sequence[Link]],
    in_flight_limit: int | Sequence[int] | None = None,
) -> None:
    """Check a schedule. Every forward and backward runs exactly once, on the rank of its stage, after its operands.

    Every send has its receive, of the same shapes and dtypes and in the same order. No timing makes ranks wait for each
    other for ever.

    ``links``: one sequence for all ranks, or one per rank where each rank has derived them for itself.
    ``in_flight_limit``: the number of (stage, microbatch) activations that a rank may hold at a time; one number for
    all ranks, or one per rank. Raises ScheduleError, which names the instruction.
    """
    ranks = len(schedule.ranks)
    seen: list[Sequence[Link]] = (
        [links] * ranks if all(isinstance(link, Link) for link in links) else list(links)  # type: ignore[arg-type, list-item]
    )
    if len(seen) != ranks:
        raise ScheduleError(f"{schedule.title}: links of {len(seen)} ranks for a schedule of {ranks} ranks")
    check_computes(schedule)
    for own in seen:
        _check_links(schedule, own)
    check_messages(schedule, seen)
    _check_progress(schedule, seen)
    if in_flight_limit is not None:
        limits = [in_flight_limit] * ranks if isinstance(in_flight_limit, int) else list(in_flight_limit)
        _check_in_flight(schedule, limits)


def check_computes(schedule: Schedule) -> None:
    """Check the computes of a schedule with or without messages, as :func:`check_schedule` does.

    Raises ScheduleError.
    """
    _check_sizes(schedule)
    where = _positions(schedule)
    backward = any(step.kind is not Kind.F for step in where)
    for stage in range(len(schedule.placement)):
        for microbatch in range(schedule.microbatches):
            f, b, i, w = (Compute(kind, stage, microbatch) for kind in (Kind.F, Kind.B, Kind.I, Kind.W))
            rank = f"rank {schedule.placement[stage]}"
            if f not in where:
                raise ScheduleError(f"{schedule.title}: {rank} never computes {f}")
            if not backward:
                continue
            if b in where and (i in where or w in where):
                raise ScheduleError(
                    f"{schedule.title}: {rank} computes {b} and {i if i in where else w}: {b} is both I and W"
                )
            if b not in where and i not in where:
                raise ScheduleError(
                    f"{schedule.title}: {rank} computes {f}, but neither {b} nor {i}: give every F a backward"
                )
            if i in where and w not in where:
                raise ScheduleError(
                    f"{schedule.title}: {rank} computes {i} and never {w}, the gradients of the weights"
                )
            for first, then in ((f, b), (f, i), (i, w)):
                if then in where and where[then] < where[first]:
                    raise ScheduleError(f"{schedule.title}: {rank} computes {then} before {first}, which it needs")


def _check_sizes(schedule: Schedule) -> None:
    stages, ranks = len(schedule.placement), len(schedule.ranks)
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < ranks:
            raise ScheduleError(
                f"{schedule.title}: stage {stage} lies on rank {rank}; there are instructions of {ranks} ranks"
            )
    for rank, steps in enumerate(schedule.ranks):
        for step in steps:
            if not 0 <= step.microbatch < schedule.microbatches:
                raise ScheduleError(
                    f"{schedule.title}: rank {rank} has {step}; there are {schedule.microbatches} microbatches"
                )
            for stage in (step.stage,) if isinstance(step, Compute) else (step.stage, step.peer):
                if not 0 <= stage < stages:
                    raise ScheduleError(f"{schedule.title}: rank {rank} has {step}; there are {stages} stages")


def _positions(schedule: Schedule) -> dict[Compute, int]:
    """The position of each compute in the list of its rank."""
    where: dict[Compute, int] = {}
    for rank, steps in enumerate(schedule.ranks):
        for position, step in enumerate(steps):
            if not isinstance(step, Compute):
                continue
            home = schedule.placement[step.stage]
            if home != rank:
                raise ScheduleError(
                    f"{schedule.title}: rank {rank} computes {step}; stage {step.stage} lies on rank {home}"
                )
            if step in where:
                raise ScheduleError(
                    f"{schedule.title}: rank {rank} computes {step} twice, as instruction {where[step] + 1} "
                    f"and {position + 1}"
                )
            where[step] = position
    return where


def _check_links(schedule: Schedule, links: Sequence[Link]) -> None:
    ends: set[tuple[int, int]] = set()
    for link in links:
        stages = len(schedule.placement)
        if link.source == link.target or not (0 <= link.source < stages and 0 <= link.target < stages):
            raise ScheduleError(f"{schedule.title}: a link {link.source} -> {link.target} between {stages} stages")
        if (link.source, link.target) in ends:
            raise ScheduleError(
                f"{schedule.title}: two links {link.source} -> {link.target}; all that crosses there is one message"
            )
        ends.add((link.source, link.target))


def _check_progress(schedule: Schedule, links: Sequence[Sequence[Link]]) -> None:
    _, stuck = walk(schedule, [Flow(len(schedule.placement), own) for own in links])
    if stuck:
        raise ScheduleError(_circle(schedule, stuck))


def _circle(schedule: Schedule, stuck: Stuck) -> str:
    """The message that says which rank waits for which."""
    rank, path = next(iter(stuck)), list[int]()
    while rank not in path:
        path.append(rank)
        rank = schedule.placement[stuck[rank][1].source]
    path = path[path.index(rank) :]
    if len(path) == 1:
        at, message = stuck[rank]
        return f"{schedule.title}: rank {rank} computes {at} before what makes {message}, which it needs"
    lines = []
    for here in path:
        at, message = stuck[here]
        there = schedule.placement[message.source]
        lines.append(
            f"  rank {here} stands at {at}, which needs {message}; rank {there} has that behind {stuck[there][0]}"
        )
    if len(path) > MOST_RANKS_OF_A_CYCLE:
        half = MOST_RANKS_OF_A_CYCLE // 2
        lines[half:-half] = [f"  ... {len(path) - 2 * half} more ranks ..."]
    return "\n".join([f"{schedule.title}: {len(path)} ranks wait for each other for ever", *lines])


def _check_in_flight(schedule: Schedule, limits: Sequence[int]) -> None:
    if len(limits) != len(schedule.ranks):
        raise ScheduleError(f"{schedule.title}: {len(limits)} limits in flight for {len(schedule.ranks)} ranks")
    for rank, limit in enumerate(limits):
        peak = peak_in_flight(schedule.computes(rank))
        if peak > limit:
            raise ScheduleError(
                f"{schedule.title}: rank {rank} holds the activations of {peak} forwards, {limit} are allowed; "
                f"it starts with {_opening(schedule, rank)}: let backwards come earlier, or choose 1f1b"
            )


def _opening(schedule: Schedule, rank: int) -> str:
    """The first runs of equal kinds on a rank: ``4 F, 1 B, 1 F``."""
    runs = [(kind, len(list(run))) for kind, run in groupby(step.kind for step in schedule.computes(rank))]
    return ", ".join(f"{count} {kind.value}" for kind, count in runs[:3])
