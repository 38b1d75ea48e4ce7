"""Starts a function on N local gloo processes, as torchrun would, and gives back what each returned.

The processes are forked off a server that has imported and compiled what they need: a start costs 0.2 s, not 7. They
share a cache of their own, as the ranks of users do: one of them compiles, and all read what it has kept.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["autopar.api", "autopar.passes", "tests.forked_from"])


class RankError(Exception):
    """A rank raised; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """``function(*args)`` on ``ranks`` processes with torchrun's environment; their results in rank order.

    ``function`` and ``args`` have to be picklable. Raises RankError for the first rank that raises, TimeoutError.
    """
    results = try_ranks(function, ranks, *args, timeout=timeout)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise RankError(f"rank {rank}: {result}") from None
    return results


def try_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """As :func:`run_ranks`, with a RankError in place of the result of a rank that raised, None of one that died."""
    port = _free_port()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for rank in range(ranks):
            ours, theirs = SERVER.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "AUTOPAR_CACHE": cache,
            }
            process = SERVER.Process(target=_rank, args=(theirs, environment, function, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process, pipe in zip(processes, pipes):
                pipe.close()  # now they may end: a rank that ended early would look like a failure to the others
                process.join(5.0)
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait([pipes[rank] for rank in waiting.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not end in time")
        for pipe in ready:
            rank = waiting.pop(id(pipe))
            try:
                results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                results[rank] = None
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        result: Any = function(*args)
    except BaseException as problem:
        result = RankError(f"{problem}\n{traceback.format_exc()}")
        result.add_note(type(problem).__name__)
    pipe.send_bytes(pickle.dumps(result))  # not send: that would hand tensors over as files of a process that ends
    with suppress(EOFError, OSError):
        pipe.recv_bytes()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
