"""Buffers that one pipeline stage writes and others read: after a step, each rank that has one has its new value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.communication.communicator import Communicator
from autopar.dtensors.dtensor import local_of
from autopar.ir.program import PipelinedProgram
from autopar.ir.tables import InputKind, OutputKind
from autopar.weights.absent import Table

WHAT = "passing on a buffer that another stage has written"


@dataclass(frozen=True)
class _Passed:
    """One buffer: the pipeline rank that writes it, and the others that read it."""

    target: str
    source: int
    readers: tuple[int, ...]


class BuffersOfStages:
    """Those of a program, on the rank of ``comm``; ``slots``: where the module has them, by name."""

    def __init__(
        self, program: PipelinedProgram, comm: Communicator, slots: Mapping[str, tuple[Table, str]], rank: int
    ) -> None:
        self._comm, self._rank = comm, rank
        self._mine = [(one, slots[one.target]) for one in _passed(program) if rank == one.source or rank in one.readers]

    def pass_on(self) -> None:
        """Collective over the pipeline ranks that have one; to be called once the step has written all of them."""
        sent: list[dist.Work] = []
        coming: list[tuple[Tensor, Tensor, dist.Work]] = []
        for one, (table, key) in self._mine:
            buffer = local_of(table[key])
            if self._rank == one.source:
                sent += [self._comm.send(buffer.contiguous(), reader) for reader in one.readers]
            else:
                new = torch.empty_like(buffer, memory_format=torch.contiguous_format)
                coming.append((buffer, new, self._comm.receive(new, one.source)))
        for work in sent:
            self._comm.finish(work, WHAT)
        for buffer, new, work in coming:
            self._comm.finish(work, WHAT)
            with torch.no_grad():
                buffer.copy_(new)


def _passed(program: PipelinedProgram) -> list[_Passed]:
    """In the same order on all ranks."""
    placement = program.required_schedule.placement
    sources: dict[str, int] = {}
    readers: dict[str, set[int]] = {}
    for rank, stage in zip(placement, program.stages):
        for output in stage.outputs:
            if output.kind is OutputKind.BUFFER_UPDATE:
                sources[output.target] = rank
        for _, entry in stage.takes(InputKind.BUFFER):
            readers.setdefault(entry.target, set()).add(rank)
    found = [(target, source, readers.get(target, set()) - {source}) for target, source in sources.items()]
    return [_Passed(target, source, tuple(sorted(others))) for target, source, others in found if others]
