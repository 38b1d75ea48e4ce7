"""The processes that hold one model, where they must reach the same result: all of them continue, or none does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from autopar.checkpoint.watched_files import Progress
from autopar.communication.communicator import peer_failed
from autopar.errors import AutoparError, CheckpointError, RankFailedError
from autopar.module import held_by

TIMEOUT = 300.0  # seconds, for an ordinary module; as Plan(timeout=) has by default
FIRST_PAUSE, LONGEST_PAUSE = 0.002, 1.0  # seconds between two looks at each other
T = TypeVar("T")


class Peers:
    """The ranks of ``model``'s mesh, or of the world for an ordinary module, with a gloo group of their own: it works
    beside the collectives of training, in another thread. Making one is collective.

    A rank that does not come for ``timeout`` seconds, that of the plan, ends the others with a RankFailedError.
    """

    def __init__(self, model: nn.Module) -> None:
        self.group: ProcessGroup | None = None
        self.rank, self.size, self.timeout = 0, 1, TIMEOUT
        if not dist.is_initialized():
            return
        connection = held_by(model).weights.connection
        ranks = connection.device_mesh.mesh.flatten().tolist() if connection else list(range(dist.get_world_size()))
        self.timeout = connection.comm.timeout if connection else TIMEOUT
        self.size = len(ranks)
        with self._waiting("the first use of a checkpoint"):
            self.group = dist.new_group(
                ranks, timeout=timedelta(seconds=self.timeout), backend="gloo", use_local_synchronization=True
            )
        self.rank = dist.get_rank(self.group)

    @classmethod
    def alone(cls) -> Peers:
        """This process by itself, whatever others there are."""
        made = object.__new__(cls)
        made.group, made.rank, made.size, made.timeout = None, 0, 1, TIMEOUT
        return made

    def of_first(self, value: T) -> T:
        """The value of rank 0."""
        shared = [value]
        if self.group is not None:
            with self._waiting("a checkpoint"):
                dist.broadcast_object_list(shared, group=self.group, group_src=0)
        return shared[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        found: list[Any] = [value] * self.size
        if self.group is not None and self.size > 1:
            with self._waiting("a checkpoint"):
                dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, what: str, problem: AutoparError | None = None) -> None:
        """Wait for all; raises ``problem`` where there is one, and a CheckpointError about it on other ranks."""
        said: list[str | None] = [str(problem) if problem else None] * self.size
        if self.group is not None and self.size > 1:
            with self._waiting(what):
                dist.all_gather_object(said, said[self.rank], group=self.group)
        if problem is not None:
            raise problem
        for rank, text in enumerate(said):
            if text is not None:
                raise CheckpointError(f"rank {rank}: {text}")

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """All ranks leave this block, or all raise."""
        try:
            yield
        except RankFailedError:
            raise
        except (AutoparError, OSError) as problem:
            self.agree(what, problem if isinstance(problem, AutoparError) else CheckpointError(str(problem)))
        self.agree(what)

    def side_by_side(self, what: str, work: Callable[[], T], progress: Progress) -> T:
        """The result of ``work``, once all ranks have done theirs or failed; raises what this rank's raises.

        A rank may take as long as it needs while its ``progress`` advances. One that stops, or moves no data for as
        long as the timeout, ends all others with a RankFailedError; ``work``, which runs in a thread, is left alone
        then.
        """
        if self.group is None or self.size == 1:
            return work()
        result = _started(work)
        pause = FIRST_PAUSE
        while True:
            _wait(result, pause)
            states = self._states(what, 0.0 if result.done() else max(progress.idle, 1e-9))
            if not any(states):
                return result.result()
            late = [rank for rank, idle in enumerate(states) if idle > self.timeout]
            if late:
                raise RankFailedError(_stuck(what, self.rank, late, self.timeout))
            pause = min(2 * pause, LONGEST_PAUSE, self.timeout / 4)

    def failed(self, what: str, problem: Exception) -> AutoparError:
        """The error for a wait that ended in ``problem``, raised by gloo."""
        others = [peer for peer in range(self.size) if peer != self.rank]
        return peer_failed(what, self.rank, others, self.timeout, problem)

    def _states(self, what: str, idle: float) -> list[float]:
        """Of each rank: 0 where its work is done, else the seconds since it has moved data."""
        found = [torch.zeros((), dtype=torch.float64) for _ in range(self.size)]
        with self._waiting(what):
            dist.all_gather(found, torch.tensor(idle, dtype=torch.float64), group=self.group)
        return [float(state) for state in found]

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as failure:
            raise self.failed(what, failure) from None


def _started(work: Callable[[], T]) -> Future[T]:
    """The result of ``work``, which runs in a thread that no end of the process waits for."""
    result: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            result.set_result(work())
        except BaseException as problem:
            result.set_exception(problem)

    threading.Thread(target=run, name="autopar checkpoint", daemon=True).start()
    return result


def _wait(result: Future[Any], seconds: float) -> None:
    """Until there is a result or an exception, at most so long."""
    with suppress(TimeoutError):
        result.exception(seconds)


def _stuck(what: str, rank: int, late: list[int], timeout: float) -> str:
    those = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
    return (
        f"rank {rank} waited in {what} for {those}: no byte was moved there for {timeout:g} s.\n"
        "Likely: the file system does not answer.\n"
        "Way out: start again from the last checkpoint, which is complete; give a slow file system longer: "
        "Plan(timeout=seconds)."
    )
