"""The timeline of a step of ``autopar train``: the files of all ranks as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autopar.commands.launch import is_rank
from autopar.commands.tables import stderr
from autopar.traces.slices import OF_RANKS, WHOLE, merged, write_document


@contextmanager
def joined_traces(directory: Path | None) -> Iterator[None]:
    """Around a run whose ranks write timelines to ``directory/ranks``: those of an earlier run, which may have had more
    ranks, are removed before it, and ``directory/step.json`` has all of them afterwards.

    Does nothing in a process that torchrun started, which has others beside it. A run that is stopped early may have
    written none.
    """
    if directory is None or is_rank():
        yield
        return
    for path in (directory / OF_RANKS).glob("rank*.json"):
        path.unlink()
    yield
    if any((directory / OF_RANKS).glob("rank*.json")):
        write_document(merged(directory / OF_RANKS), directory / WHOLE)
        stderr().print(f"timeline of a step: {directory / WHOLE}, for ui.perfetto.dev", soft_wrap=True, markup=False)
