"""The memory table of a program: what a rank of each pipeline place holds in a training step, and the most at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autopar.ir.collectives import ROUTES
from autopar.ir.node import origin, value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind
from autopar.memory.account import (
    ACTIVATIONS,
    BUFFERS,
    GATHERED,
    GRADIENTS,
    IN_FLIGHT,
    KINDS,
    PARAMETERS,
    WORKING,
    Account,
)
from autopar.memory.optimizers import optimizer_named, refuse_split
from autopar.memory.shapes import Operators
from autopar.memory.stage import pipelined_step
from autopar.memory.step import flat_step
from autopar.memory.tape import Tapes
from autopar.mesh import PIPELINE

STATES = "optimizer"
UPDATE = "optimizer step"
LASTING = (PARAMETERS, GATHERED, BUFFERS)  # what is still held when the optimizer changes the parameters


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank in a training step; where splits are uneven, of one that has the larger parts.

    Attributes:
        place: its pipeline rank; 0 without a pipeline.
        first, last: the ranks of this place, which hold the same.
        parameters: as the rank holds them between steps (its parts, in the dtype that the optimizer sees).
        gradients: those of parameters, as the backward pass leaves them.
        optimizer: the states of the optimizer.
        activations: what forward keeps for backward, of all microbatches at once.
        in_flight: the most at once in results of collectives that are under way.
        gathered: the most at once in whole parameters that were gathered, and in their casts.
        step_peak: the most at once in forward and backward, as the simulator counts: without optimizer states.
        peak: the most at once of all, in the step and while the optimizer changes the parameters.
        at_peak: kind -> bytes when it was largest; their sum is ``peak``. ``working``: what backward needs meanwhile.
        phase, where: the run, and the module or value, at which it was largest.
        timeline: after each run of a graph, its name and what is held, kind -> bytes.
    """

    place: int
    first: int
    last: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    in_flight: int
    gathered: int
    step_peak: int
    peak: int
    at_peak: Mapping[str, int]
    phase: str
    where: str
    timeline: tuple[tuple[str, Mapping[str, int]], ...] = ()

    @property
    def ranks(self) -> str:
        """In words."""
        return f"rank {self.first}" if self.first == self.last else f"ranks {self.first} to {self.last}"


@dataclass(frozen=True)
class MemoryTable:
    """``ranks``: one entry for each pipeline place."""

    optimizer: str
    ranks: tuple[RankMemory, ...]

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda one: one.peak)

    def of(self, rank: int) -> RankMemory:
        """What this rank of the mesh holds. Raises ValueError for one that there is not."""
        for one in self.ranks:
            if one.first <= rank <= one.last:
                return one
        raise ValueError(f"there is no rank {rank}: the mesh has {self.ranks[-1].last + 1}")

    def to_json(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "largest": self.largest.first,
            "ranks": [asdict(one) for one in self.ranks],
        }


def memory_of(
    program: AnyProgram, optimizer: str = "adamw", *, small: int = 1, timeline: bool = True, uneven: bool = False
) -> MemoryTable:
    """The memory of a finished program, of any size: nothing is allocated, and nothing is run.

    Rows for experts are as many as if their load were even; with a ``capacity_factor`` they always are.

    Args:
        optimizer: one of :data:`autopar.memory.optimizers.OPTIMIZERS`; each is counted with the temporaries of torch's
            ``foreach`` form, one more tensor for each parameter, while it changes them.
        uneven: count rows for experts as if all tokens chose those of one rank, which is then the largest.
        small: of a pipeline whose last microbatches have fewer rows, how many these are.

    Raises ValueError for an unknown optimizer, and for one that cannot update parameters that are split as those of
    ``program``; InvariantError for a program that is not differentiated.
    """
    optimizer_named(optimizer)
    for stage in program.parts:
        _refuse_split(stage, optimizer)
    mesh = program.mesh.of_stage if isinstance(program, PipelinedProgram) else program.mesh
    last = mesh.coordinates(mesh.world_size - 1)  # the first rank of an axis may hold less (``keep_first``)
    tapes, found = Tapes(mesh, last, Operators(), uneven=uneven), []
    for place in range(program.mesh.size(PIPELINE)):
        account = Account()
        if isinstance(program, PipelinedProgram):
            pipelined_step(program, place, tapes, account, small)
            stages = list(program.stages_on(place).values())
        else:
            flat_step(program, tapes, account)
            stages = [program]
        states = _states(stages, optimizer)
        first = place * mesh.world_size
        found.append(_of_rank(place, (first, first + mesh.world_size - 1), account, stages, states, timeline))
    return MemoryTable(optimizer, tuple(found))


def sends_rows(program: AnyProgram) -> bool:
    """Whether ranks send rows to their experts, as many as there are: then the load may be uneven."""
    return any(node.target in ROUTES for stage in program.parts for node in stage.required_role.inference.nodes)


def _of_rank(
    place: int, ranks: tuple[int, int], account: Account, stages: list[Program], states: int, timeline: bool
) -> RankMemory:
    learned = {name for stage in stages for name in stage.required_role.grads}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in _parameters(stages).items()}
    gradients = sum(size for name, size in sizes.items() if name in learned)  # laid out as their parameters
    updating = {KINDS[kind]: account.live[kind] for kind in LASTING}
    updating |= {KINDS[GRADIENTS]: gradients, KINDS[WORKING]: gradients if states else 0}
    stepping = dict(zip(KINDS, account.at_most))
    in_update = sum(updating.values()) > account.most
    at_peak = {**dict.fromkeys(KINDS, 0), **(updating if in_update else stepping), STATES: states}
    node = account.where
    where = "" if in_update or node is None else origin(node).module or node.name
    return RankMemory(
        place, *ranks, sum(sizes.values()), gradients, states,
        activations=max(live[ACTIVATIONS] for _, live in account.marks),
        in_flight=account.most_of[IN_FLIGHT],
        gathered=account.most_of[GATHERED],
        step_peak=account.most,
        peak=sum(at_peak.values()),
        at_peak=at_peak,
        phase=UPDATE if in_update else account.most_phase,
        where=where,
        timeline=tuple((phase, dict(zip(KINDS, sizes))) for phase, sizes in account.marks) if timeline else (),
    )  # fmt: skip


def _parameters(stages: list[Program]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Target -> (local shape, dtype) of the parameters of a rank."""
    return {
        entry.target: (tuple(value(node).layout.local_shape(stage.mesh)), value(node).dtype)
        for stage in stages
        for node, entry in stage.placeholders(InputKind.PARAMETER)
    }


def _refuse_split(stage: Program, optimizer: str) -> None:
    for node, entry in stage.placeholders(InputKind.PARAMETER):
        if value(node).layout.axes and entry.target in stage.required_role.grads:
            refuse_split(optimizer, entry.target)


def _states(stages: list[Program], optimizer: str) -> int:
    """Bytes of the states of parameters that get a gradient."""
    grads = {name for stage in stages for name in stage.required_role.grads}
    count = optimizer_named(optimizer).states
    return sum(count(*kind) for name, kind in _parameters(stages).items() if name in grads)
