"""The one door to the timeout of a process group, which torch lets nobody read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout


def options(backend: str, seconds: float) -> Any:
    """The options of a new group of ``backend``, so that making it, and using it, fails after ``seconds``."""
    makers: dict[str, Callable[[], Any]] = {
        "gloo": lambda: dist.ProcessGroupGloo._Options(),  # type: ignore[attr-defined]
        "nccl": lambda: dist.ProcessGroupNCCL.Options(),
    }
    if backend not in makers:
        return backend
    found = makers[backend]()
    found._timeout = timedelta(seconds=seconds)
    return found


def set_timeout(group: ProcessGroup, seconds: float) -> None:
    """Let every operation on ``group`` that a peer does not join fail after ``seconds``."""
    if dist.get_backend(group) in ("gloo", "nccl", "cpu:gloo,cuda:nccl"):
        _set_pg_timeout(timedelta(seconds=seconds), group)


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long an operation on ``group``, on the CPU, waits for a peer; messages of gloo have to be told."""
    backend: Any = group._get_backend(torch.device("cpu"))
    found: timedelta = backend.options._timeout
    return found
