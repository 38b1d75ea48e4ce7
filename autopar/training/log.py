"""The log of ``autopar train``: one JSON object a line, for every step and every other event of the run."""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from autopar.ir.traffic import Transfer


class Log(AbstractContextManager["Log"]):
    """Writes to ``path``; without one, nothing. ``append``: after the lines of an earlier run."""

    def __init__(self, path: Path | None, append: bool) -> None:
        self._stream = None
        if path is not None:
            try:
                self._stream = path.open("a" if append else "w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ValueError(f"--log {path}: {error.strerror}\nWay out: a file in a folder that exists.") from error

    def write(self, **record: Any) -> None:
        """One line; entries that are None are left out."""
        if self._stream is not None:
            self._stream.write(json.dumps({key: value for key, value in record.items() if value is not None}) + "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on a CUDA device; elsewhere the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts with that of the parent process
        most = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if most is not None:
            return int(most.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def bytes_by_axis(traffic: tuple[Transfer, ...]) -> dict[str, int]:
    """Bytes that one rank has sent over each axis."""
    found: Counter[str] = Counter()
    for entry in traffic:
        found[entry.axis] += entry.bytes
    return dict(found)


def added(one: tuple[Transfer, ...], other: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    """What both counts have together."""
    found = {(entry.phase, entry.axis, entry.name): entry for entry in one}
    for entry in other:
        key = (entry.phase, entry.axis, entry.name)
        old = found.get(key)
        operations, moved = (old.operations, old.bytes) if old else (0, 0)
        found[key] = Transfer(*key, entry.operations + operations, entry.bytes + moved)
    return tuple(found.values())


def since(before: tuple[Transfer, ...], now: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    """The transfers between two counts."""
    known = {(entry.phase, entry.axis, entry.name): entry for entry in before}
    found = []
    for entry in now:
        old = known.get((entry.phase, entry.axis, entry.name))
        operations, moved = (old.operations, old.bytes) if old else (0, 0)
        if entry.operations > operations:
            found.append(
                Transfer(entry.phase, entry.axis, entry.name, entry.operations - operations, entry.bytes - moved)
            )
    return tuple(found)
