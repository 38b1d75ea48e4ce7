"""Slices of time on the streams of ranks, and the file in which viewers and analysers of traces read them.

The file is a JSON document in the trace event format of Chrome and Perfetto ("Trace Event Format", Google, 2016:
complete events ``X``, metadata ``M``; times in microseconds). Each rank is a process, each of its streams a thread.
What computes or communicates has the category and the number of a stream that PyTorch's profiler gives to kernels, and
``distributedInfo`` says whose file it is: so Holistic Trace Analysis reads a directory with one file for each rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.mesh import Mesh

COMPUTE, SCHEDULE, BUBBLES, RUNS = "compute", "schedule", "bubbles", "runs"
NO_KERNELS = (SCHEDULE, BUBBLES, RUNS)  # they say what the kernels beside them belong to
WHOLE, OF_RANKS = "step.json", "ranks"  # of a step: all ranks in one file, and a folder with a file for each
FIRST = (SCHEDULE, BUBBLES, RUNS, COMPUTE)  # above the streams of communication


@dataclass(frozen=True, slots=True)
class Slice:
    """What a rank did on one of its streams; times in seconds from the start of the trace."""

    rank: int
    stream: str
    name: str
    start_s: float
    end_s: float
    about: Mapping[str, Any] = field(default_factory=dict)


def document_of(
    slices: Sequence[Slice], mesh: Mesh, *, backend: str, rank: int = 0, base_ns: int = 0
) -> dict[str, Any]:
    """The document of the slices of one rank, or of several.

    ``base_ns``: the start of the trace, in nanoseconds since 1970. ``rank``: whose file it is.
    """
    streams = _numbered(slices)
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base_ns,
        "distributedInfo": {"backend": backend, "rank": rank, "world_size": mesh.world_size},
        "mesh": dict(mesh.axes),
        "traceEvents": [*_names(streams, mesh), *(_event(one, streams) for one in slices)],
    }


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Write a document, whole or not at all. The blank after a colon is for readers that look for ``"rank": 0``."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(json.dumps(document, separators=(",", ": ")), encoding="ascii")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def merged(directory: str | Path) -> dict[str, Any]:
    """One document of the files that the ranks wrote to ``directory``, their clocks aligned.

    Raises ValueError where there are none, or a file is no trace.
    """
    found = []
    for path in sorted(Path(directory).glob("rank*.json")):
        try:
            one = json.loads(path.read_bytes())
        except ValueError as problem:
            raise ValueError(f"{path} is no trace of a rank: {problem}") from problem
        if not isinstance(one, dict) or not {"traceEvents", "baseTimeNanoseconds"} <= one.keys():
            raise ValueError(f"{path} is no trace of a rank: it has no traceEvents and baseTimeNanoseconds")
        found.append(one)
    if not found:
        raise ValueError(f"{directory} has no files rank0.json, rank1.json, ...: a trace writes one for each rank")
    base = min(one["baseTimeNanoseconds"] for one in found)
    events = []
    for one in found:
        later = (one["baseTimeNanoseconds"] - base) / 1e3
        events += [{**event, "ts": event["ts"] + later} if "ts" in event else event for event in one["traceEvents"]]
    return {**found[0], "baseTimeNanoseconds": base, "traceEvents": events}


def gaps(slices: Iterable[Slice], start_s: float, end_s: float) -> Iterator[tuple[float, float, Slice | None]]:
    """The times between ``start_s`` and ``end_s`` in which none of ``slices``, which do not overlap, runs; with the
    one that comes after."""
    clock = start_s
    for one in sorted(slices, key=lambda one: one.start_s):
        if one.start_s > clock:
            yield clock, one.start_s, one
        clock = max(clock, one.end_s)
    if end_s > clock:
        yield clock, end_s, None


def one_after_the_other(slices: Iterable[Slice]) -> list[Slice]:
    """``slices`` of streams that run what they are given in order, as they ran; given from issue to seen to be ended.

    Each starts when it was issued, or when the one before it in its stream has ended. Where a later one was seen to be
    ended first, all that is known is that it ended in between: it is drawn up to the issue of the next.
    """
    found: list[Slice] = []
    streams: dict[tuple[int, str], list[Slice]] = {}
    for one in slices:
        streams.setdefault((one.rank, one.stream), []).append(one)
    for own in streams.values():
        own.sort(key=lambda one: (one.start_s, one.end_s))
        ends, after, latest = list[float](), float("inf"), float("inf")
        for one in reversed(own):
            ends.append(one.end_s if one.end_s < latest else min(after, latest))
            after, latest = one.start_s, min(latest, one.end_s)
        before = float("-inf")
        for one, end in zip(own, reversed(ends)):
            start = max(one.start_s, before)
            before = max(start, end)
            found.append(Slice(one.rank, one.stream, one.name, start, before, one.about))
    return found


def _numbered(slices: Iterable[Slice]) -> dict[tuple[int, str], int]:
    """(rank, stream) -> number of the thread, the same on all ranks for the same stream."""
    names = {one.stream for one in slices}
    order = [name for name in FIRST if name in names] + sorted(names.difference(FIRST))
    numbers = {name: number for number, name in enumerate(order, 1)}
    return {(one.rank, one.stream): numbers[one.stream] for one in sorted(slices, key=lambda one: one.rank)}


def _names(streams: Mapping[tuple[int, str], int], mesh: Mesh) -> Iterator[dict[str, Any]]:
    for rank in dict.fromkeys(rank for rank, _ in streams):
        where = " ".join(f"{axis}={place}" for axis, place in mesh.coordinates(rank).items())
        yield _metadata("process_name", rank, 0, name=f"rank {rank}")
        yield _metadata("process_labels", rank, 0, labels=where)
        yield _metadata("process_sort_index", rank, 0, sort_index=rank)
    for (rank, stream), number in streams.items():
        yield _metadata("thread_name", rank, number, name=stream)
        yield _metadata("thread_sort_index", rank, number, sort_index=number)


def _metadata(what: str, rank: int, number: int, **about: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": number, "args": about}


def _event(one: Slice, streams: Mapping[tuple[int, str], int]) -> dict[str, Any]:
    number = streams[one.rank, one.stream]
    start, end = (round(second * 1e6, 3) for second in (one.start_s, one.end_s))
    kernel = {} if one.stream in NO_KERNELS else {"stream": number, "device": one.rank}
    return {
        "ph": "X",
        "cat": "kernel" if kernel else "user_annotation",
        "name": one.name,
        "pid": one.rank,
        "tid": number,
        "ts": start,
        "dur": round(end - start, 3),
        "args": {**kernel, **one.about},
    }
