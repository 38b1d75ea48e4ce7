"""How long a rank waits in collectives and messages: by the host's clock, on a CUDA device by that of its stream."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up what passes between :meth:`begin` and :meth:`end`.

    On a CPU a collective returns when it has ended, so the host's clock says how long it took. On a CUDA device it is
    only launched; two events on the present stream then say how long that stream stood still, which is what the other
    streams could not hide. Events are made while ``watched`` is set.
    """

    def __init__(self, device: torch.device) -> None:
        self.watched = False
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> Any:
        """What :meth:`end` takes."""
        if not self._on_device:
            return time.perf_counter()
        return _event() if self.watched else None

    def end(self, begun: Any) -> None:
        """Add what has passed since ``begun``."""
        if not self._on_device:
            self._seconds += time.perf_counter() - begun
        elif begun is not None:
            self._pairs.append((begun, _event()))

    def seconds(self) -> float:
        """All until now; on a CUDA device, which must be synchronised, all that began while ``watched`` was set."""
        pairs, self._pairs = self._pairs, []
        self._seconds += sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1e3
        return self._seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
