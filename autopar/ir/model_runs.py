"""When code of users' may have run while programs are made: between two such times a model is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Runs:
    count = 0
    known: list[Any] | None = None


def model_runs() -> None:
    """Note that a model is run now, to be traced or compared: it may change anything."""
    _Runs.count += 1
    if _Runs.known is not None:
        _Runs.known.clear()


def runs_so_far() -> int:
    """How often :func:`model_runs` was called in this process."""
    return _Runs.count


def known_since_run() -> list[Any] | None:
    """What is true until the next run of a model, for others to add to; None outside of :func:`no_other_runs`."""
    return _Runs.known


@contextmanager
def no_other_runs() -> Iterator[None]:
    """Within this context no code of users' runs of which :func:`model_runs` is not told."""
    before, _Runs.known = _Runs.known, []
    try:
        yield
    finally:
        _Runs.known = before
