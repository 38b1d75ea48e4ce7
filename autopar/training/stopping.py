"""SIGTERM: the run ends its step, saves and stops, on all ranks after the same step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException

from autopar.communication.communicator import peer_failed

STOP_FILE = "AUTOPAR_STOP_FILE"  # exists once the process that started the ranks was asked to stop


class StopSignal:
    """Within this context, a SIGTERM to this process, or to the process that started the ranks, is noted."""

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None
        self._file = os.environ.get(STOP_FILE)

    @property
    def noted(self) -> bool:
        return self._noted or (self._file is not None and Path(self._file).exists())

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True


class StopFile:
    """In the process that starts the ranks: the first SIGTERM writes the file, the second ends the ranks."""

    def __init__(self, directory: str) -> None:
        self._path = Path(directory, "stop")
        os.environ[STOP_FILE] = str(self._path)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._path.exists():
            raise SignalException(f"process {os.getpid()} got SIGTERM twice", signal.SIGTERM)
        self._path.touch()


def most_of_ranks(numbers: list[float], device: torch.device, timeout: float) -> list[float]:
    """The largest of each number among all ranks, which wait for each other. Raises RankFailedError."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return numbers
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    try:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    except RuntimeError as problem:
        rank, size = dist.get_rank(), dist.get_world_size()
        peers = [peer for peer in range(size) if peer != rank]
        raise peer_failed("the end of a step", rank, peers, timeout, problem) from None
    return [float(number) for number in found]
