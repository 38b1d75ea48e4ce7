"""Benchmarks are run by hand and seldom; what they import of autopar must be there."""

from __future__ import annotations

import importlib
from pathlib import Path


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in Path(__file__).parents[2].glob("benchmarks/*.py"))
    assert "zero_memory" in names
    for name in names:
        importlib.import_module(f"benchmarks.{name}")
