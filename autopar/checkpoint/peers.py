"""The processes that hold one model, where they must reach the same result: all of them continue, or none does."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from autopar.errors import AutoparError, CheckpointError
from autopar.module import held_by
from autopar.runtime.communicator import peer_failed

TIMEOUT = 1800.0  # seconds; gloo's own. A peer that ends is noticed at once, one that writes slowly is waited for.


class Peers:
    """The ranks of ``model``'s mesh, or of the world for an ordinary module, with a gloo group of their own: it works
    beside the collectives of training, in another thread. Making one is collective."""

    def __init__(self, model: nn.Module) -> None:
        self.group: ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if not dist.is_initialized():
            return
        connection = held_by(model).weights.connection
        ranks = connection.device_mesh.mesh.flatten().tolist() if connection else list(range(dist.get_world_size()))
        self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.rank, self.size = dist.get_rank(self.group), len(ranks)

    def of_first(self, value: int | None) -> int | None:
        """The value of rank 0."""
        shared = [value]
        if self.group is not None:
            dist.broadcast_object_list(shared, group=self.group, group_src=0)
        return shared[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        found: list[Any] = [value] * self.size
        if self.group is not None and self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, what: str, problem: AutoparError | None = None) -> None:
        """Wait for all; raises ``problem`` where there is one, and a CheckpointError about it on other ranks."""
        said: list[str | None] = [str(problem) if problem else None] * self.size
        if self.group is not None and self.size > 1:
            try:
                dist.all_gather_object(said, said[self.rank], group=self.group)
            except RuntimeError as failure:
                raise self.failed(what, failure) from None
        if problem is not None:
            raise problem
        for rank, text in enumerate(said):
            if text is not None:
                raise CheckpointError(f"rank {rank}: {text}")

    def failed(self, what: str, problem: Exception) -> AutoparError:
        """The error for a wait that ended in ``problem``, raised by gloo."""
        return peer_failed(what, self.rank, [peer for peer in range(self.size) if peer != self.rank], TIMEOUT, problem)
