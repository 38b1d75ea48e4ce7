"""Memory that was freed leaves the process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from autopar.communication import freed_memory
from autopar.communication.freed_memory import give_back
from benchmarks.process_memory import EXACT, resident


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


STEPS = """
import resource, runpy, sys

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [b"1" * 20_000_000 for _ in range(4)]
    held.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[2]:
    runpy.run_path(sys.argv[1])["keep_freed"]()
step(), step()
print(step())
"""


@pytest.mark.parametrize("asked, environment, stays", [("keep", {}, True), ("", {}, False), ("keep", EXACT, False)])
def test_memory_that_a_step_frees_is_there_for_the_next(asked: str, environment: dict[str, str], stays: bool) -> None:
    command = [sys.executable, "-c", STEPS, freed_memory.__file__, asked]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    pages = 4 * 20_000_000 / os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) < pages / 100) if stays else (int(done.stdout) > pages / 2)
