"""The timeline of real steps: each rank writes what it did to a file (:mod:`autopar.communication.recorder`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from autopar.communication.communicator import Communicator
from autopar.communication.recorder import Recorder, epoch
from autopar.errors import InvariantError
from autopar.traces.slices import (
    BUBBLES,
    COMPUTE,
    NO_KERNELS,
    SCHEDULE,
    Slice,
    document_of,
    gaps,
    one_after_the_other,
    write_document,
)

PAUSE_S = 1.0  # ranks that compute nothing for so long are between two steps


@contextmanager
def recorded(communicator: Communicator, directory: str | Path) -> Iterator[None]:
    """Record what this rank does inside; write ``directory/rank0.json``, by its number, when that ends well.

    Raises InvariantError inside another recording, OSError for a directory that cannot be made.
    """
    if communicator.recorder is not None:
        raise InvariantError("a trace is being recorded already\nWay out: end its with-block first.")
    where = Path(directory)
    where.mkdir(parents=True, exist_ok=True)
    communicator.recorder = recorder = Recorder()
    try:
        yield
    finally:
        communicator.recorder = None
    slices = slices_of(recorder, communicator.rank)
    base_ns = round((recorder.base + epoch()) * 1e9)
    document = document_of(slices, communicator.mesh, backend=_backend(), rank=communicator.rank, base_ns=base_ns)
    write_document(document, where / f"rank{communicator.rank}.json")


def slices_of(recorder: Recorder, rank: int) -> list[Slice]:
    """What a rank did, in the order of the starts; nothing overlaps within a stream."""
    found = []
    for one in recorder.noted:
        about = one.about | ({"collective": one.operation} if one.operation else {})
        found.append(Slice(rank, one.stream, one.name, one.start - recorder.base, one.end - recorder.base, about))
    kept = [one for one in found if one.stream in (*NO_KERNELS, COMPUTE)]
    streams = one_after_the_other(one for one in found if one.stream not in (*NO_KERNELS, COMPUTE))
    return sorted([*kept, *streams, *_bubbles(found, rank)], key=lambda one: one.start_s)


def _bubbles(slices: list[Slice], rank: int) -> Iterator[Slice]:
    """The times at which a pipeline rank computes nothing, between the computes of its schedule."""
    computes = [one for one in slices if one.stream == SCHEDULE]
    if computes:
        ends = computes[0].start_s, computes[-1].end_s
        for start, end, then in gaps(computes, *ends):
            if then is not None and end - start < PAUSE_S:
                yield Slice(rank, BUBBLES, f"waits to run {then.name}", start, end)


def _backend() -> str:
    return str(dist.get_backend()) if dist.is_initialized() else "none"
