"""The timeline of a step that never ran: its operations one after the other, as long as the cost model says.

A rank computes one operation at a time, and beside that each group of ranks runs one collective at a time, each channel
between two pipeline ranks one message. An operation starts when all that it comes after has ended. All ranks of a role
take the same time, so they wait for nobody but for other stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.ir.program import AnyProgram
from autopar.mesh import PIPELINE
from autopar.traces.operations import Operation, What
from autopar.traces.slices import (
    BUBBLES,
    COMPUTE,
    OF_RANKS,
    SCHEDULE,
    WHOLE,
    Slice,
    document_of,
    gaps,
    write_document,
)
from autopar.traces.steps import Key, pairs, places_of, step_of

MOST_OPERATIONS = 200_000  # of all ranks together; where there are more, the first rank of each role is drawn


@dataclass(frozen=True)
class Timed:
    """An operation of a role; times in seconds from the start of the step."""

    operation: Operation
    start_s: float
    end_s: float


def timed(program: AnyProgram, machine: Machine = ACCELERATOR) -> tuple[tuple[Timed, ...], ...]:
    """For each position on the pipeline its operations, in the order in which ranks issue them."""
    steps = [step_of(program, place, machine) for place in places_of(program)]
    found: dict[Key, Timed] = {}
    before = {
        (place, number): [(place, other) for other in sorted(one.uses | one.after)]
        for place, step in enumerate(steps)
        for number, one in enumerate(step)
    }
    for receive, send in pairs(steps):
        before[receive].append(send)
    for place, number in TopologicalSorter(before).static_order():
        one = steps[place][number]
        start = max((found[place, other].end_s for other in one.uses | one.after), default=0.0)
        end = start + one.seconds
        if one.what is What.RECEIVE:
            message = found[before[place, number][-1]]
            start = max(start, message.start_s)
            end = max(start, message.end_s)
        found[place, number] = Timed(one, start, end)
    return tuple(tuple(found[place, number] for number in range(len(step))) for place, step in enumerate(steps))


def slices_of(own: Sequence[Timed], rank: int, end_s: float, place: int) -> Iterator[Slice]:
    """The slices of one rank: its operations, the runs of its schedule, and what it waits for."""
    for one in own:
        yield Slice(rank, stream_of(one.operation, place), one.operation.name, one.start_s, one.end_s, _about(one))
    computes = [one for one in own if one.operation.what is What.COMPUTE]
    runs: dict[str, list[Timed]] = {}
    for one in computes:
        runs.setdefault(one.operation.run, []).append(one)
    for run, of in runs.items():
        yield Slice(rank, SCHEDULE, run, of[0].start_s, of[-1].end_s, {"operations": len(of)})
    busy = [Slice(rank, COMPUTE, str(number), one.start_s, one.end_s) for number, one in enumerate(computes)]
    for start, end, then in gaps(busy, 0.0, end_s):
        if then is None:
            yield Slice(rank, BUBBLES, "waits for the end of the step", start, end)
            continue
        for since, until, reason in _waits(own, computes[int(then.name)].operation, start, end):
            yield Slice(rank, BUBBLES, f"waits for {reason}", since, until)


def stream_of(one: Operation, place: int) -> str:
    """The stream of a rank at position ``place`` of the pipeline on which an operation runs."""
    if one.what is What.COMPUTE:
        return COMPUTE
    if one.what is What.COLLECTIVE:
        return f"communication {one.axis}"
    return f"{'send to' if one.what is What.SEND else 'receive from'} {PIPELINE}={place + one.step}"


def _about(one: Timed) -> dict[str, str | int | float]:
    operation = one.operation
    found: dict[str, str | int | float] = {"run": operation.run, "phase": operation.phase, "bytes": operation.bytes}
    if operation.what is What.COMPUTE:
        found |= {"operator": operation.kind, "flops": operation.flops}
    else:
        found |= {"collective": operation.kind, "group": operation.axis, "sent": operation.sent}
    if operation.is_uneven:
        found["note"] = "bytes of a balanced load"
    return found | ({"module": operation.module} if operation.module else {})


def _waits(own: Sequence[Timed], then: Operation, start: float, end: float) -> Iterator[tuple[float, float, str]]:
    """What a rank waits for between ``start`` and ``end``, when ``then`` can run: one thing after the other."""
    latest = max((own[number] for number in then.uses | then.after), key=lambda one: one.end_s)
    if latest.start_s > start and latest.operation.what is not What.RECEIVE:
        yield from _waits(own, latest.operation, start, latest.start_s)
        start = latest.start_s
    yield start, end, latest.operation.name


def write_scheduled(
    program: AnyProgram, directory: Path, ranks: Sequence[int] | None = None, machine: Machine = ACCELERATOR
) -> list[str]:
    """Write the timeline of a step of a differentiated program to ``directory``, which exists.

    ``step.json`` has ``ranks`` together, ``ranks/rank0.json``, ... each of them alone; where that would be more than
    200,000 operations, of these the first of each role. Gives the names of the files, ``step.json`` first. Raises
    ValueError for a rank that is not on the mesh; InvariantError.
    """
    mesh, roles = program.mesh, timed(program, machine)
    end_s = max((one.end_s for own in roles for one in own), default=0.0)
    if ranks is None:
        ranks = range(mesh.world_size)
    places = {rank: mesh.coordinates(rank).get(PIPELINE, 0) for rank in ranks}
    if sum(len(roles[place]) for place in places.values()) > MOST_OPERATIONS:
        first = {place: rank for rank, place in reversed(places.items())}
        places = {rank: place for place, rank in sorted(first.items())}
    (directory / OF_RANKS).mkdir()
    found: list[Slice] = []
    names = [WHOLE]
    for rank, place in places.items():
        own = sorted(slices_of(roles[place], rank, end_s, place), key=lambda piece: piece.start_s)
        names.append(f"{OF_RANKS}/rank{rank}.json")
        write_document(document_of(own, mesh, backend="scheduled", rank=rank), directory / names[-1])
        found += own
    write_document(document_of(found, mesh, backend="scheduled"), directory / WHOLE)
    return names
