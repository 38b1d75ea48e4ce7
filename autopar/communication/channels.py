"""Messages between pipeline ranks, on torch.distributed: sends and receives that run beside the computation.

A channel holds all messages from one rank to another, first in, first out. Shapes are known on both sides; small values
of one message travel in one piece. With NCCL each direction has a communicator of its own: otherwise two ranks that
send to each other at once would wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.communication.communicator import Communicator
from autopar.mesh import PIPELINE, Mesh
from autopar.schedules.instructions import Kind, Message
from autopar.schedules.packing import Types, together


def group_back(mesh: Mesh, group: ProcessGroup, timeout: float) -> ProcessGroup | None:
    """The group of messages to lower pipeline ranks; collective.

    None where ``group``, that of axis ``pp``, serves both.
    """
    if dist.get_backend(group) != "nccl":
        return None
    members = [list(ranks) for ranks in mesh.groups(PIPELINE)]
    back: ProcessGroup
    back, _ = dist.new_subgroups_by_enumeration(members, timeout=timedelta(seconds=timeout))  # type: ignore[no-untyped-call]
    return back


class Channels:
    """The messages of one rank in one step.

    ``types``: for each microbatch, the content of a message, by its kind, the stage that makes it and the one that
    takes it.
    """

    def __init__(self, comm: Communicator, types: Sequence[Mapping[tuple[Kind, int, int], Types]]) -> None:
        self.comm, self.types = comm, types
        self._coming: dict[Message, list[tuple[Tensor, dist.Work]]] = {}
        self._going: dict[Message, list[tuple[Tensor, dist.Work]]] = {}

    def send(self, message: Message, values: list[Any], rank: int) -> None:
        works = []
        for group in together([(tuple(tensor.shape), tensor.dtype) for tensor in values]):
            parts = [values[position] for position in group]
            tensor = torch.cat([part.flatten() for part in parts]) if len(parts) > 1 else parts[0].contiguous()
            works.append((tensor, self.comm.send(tensor, rank)))
        values.clear()
        self._going[message] = works
        self._forget_sent()

    def post(self, message: Message, rank: int) -> None:
        types, works = self._types(message), []
        for group in together(types):
            shape = types[group[0]][0] if len(group) == 1 else (sum(math.prod(types[at][0]) for at in group),)
            tensor = torch.empty(shape, dtype=types[group[0]][1], device=self.comm.device)
            works.append((tensor, self.comm.receive(tensor, rank)))
        self._coming[message] = works

    def arrived(self, message: Message) -> bool:
        """Always True: :meth:`take` waits."""
        return True

    def take(self, message: Message) -> list[Any]:
        types, found = self._types(message), dict[int, Tensor]()
        tensors = self._finished(self._coming.pop(message), f"message {message}")
        for group, tensor in zip(together(types), tensors):
            sizes = [math.prod(types[at][0]) for at in group]
            parts = torch.split(tensor, sizes) if len(group) > 1 else [tensor]  # type: ignore[no-untyped-call]
            found |= {at: part.view(types[at][0]) for at, part in zip(group, parts)}
        return [found[at] for at in range(len(types))]

    def _types(self, message: Message) -> Types:
        return self.types[message.microbatch][message.kind, message.source, message.target]

    def sent(self, stage: int, microbatch: int) -> None:
        """Wait until the message of ``stage`` for ``microbatch`` has left: its memory may be written to afterwards."""
        for message in [m for m in self._going if (m.source, m.microbatch) == (stage, microbatch)]:
            self._finished(self._going.pop(message), f"sending {message}")

    def end(self) -> None:
        """Wait for all messages that are still on their way."""
        for message in list(self._going):
            self._finished(self._going.pop(message), f"sending {message}")

    def _forget_sent(self) -> None:
        for message in list(self._going):
            if not all(work.is_completed() for _, work in self._going[message]):
                return
            self._finished(self._going.pop(message), f"sending {message}")

    def _finished(self, works: list[tuple[Tensor, dist.Work]], what: str) -> list[Any]:
        for _, work in works:
            self.comm.finish(work, what)
        return [tensor for tensor, _ in works]
