"""Memory that was freed leaves the process."""

from __future__ import annotations

import gc

import pytest

from autopar.runtime.freed_memory import give_back
from benchmarks.process_memory import resident


def test_freed_objects_leave_the_process() -> None:
    give_back()
    before = resident()
    held = [bytes(1000) for _ in range(50_000)]
    kept = held[-1]  # at the end of the heap, which therefore cannot shrink by itself
    full = resident() - before
    del held
    gc.collect()
    give_back()
    assert len(kept) == 1000 and resident() - before < full / 2


def test_nothing_happens_without_such_a_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ctypes.CDLL", asked.append)
    give_back()
    assert asked == [None]
