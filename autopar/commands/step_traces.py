"""The timeline of a step of ``autopar train``, the files of all ranks as one; and the profiles of the ranks."""

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


@contextmanager
def fresh_profiles(directory: Path | None) -> Iterator[None]:
    """As :func:`joined_traces`, for profiles: those of an earlier run are removed, and afterwards it says where they
    are."""
    if directory is None or is_rank():
        yield
        return
    for path in directory.glob("rank*.json"):
        path.unlink()
    yield
    found = sorted(directory.glob("rank*.json"))
    if found:
        line = f"profile of a step: {found[0]}{' and one a rank' if len(found) > 1 else ''}, for ui.perfetto.dev"
        stderr().print(line, soft_wrap=True, markup=False)
