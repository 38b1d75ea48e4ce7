"""What a rank holds over a step, moment by moment: the account of :mod:`autopar.memory`, noted after each line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autopar.ir.node import Node
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.memory.account import KINDS, Account
from autopar.memory.device import Device, helps
from autopar.memory.shapes import Operators
from autopar.memory.stage import pipelined_step
from autopar.memory.step import flat_step
from autopar.memory.table import STATES, UPDATE, MemoryTable, RankMemory
from autopar.memory.tape import Tapes
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.report import document
from autopar.report.document import Memory, Moment

ORDER = (  # from below: what stays for the whole step first
    "parameters", STATES, "gradients", "gathered", "buffers", "inputs", "activations", "working", "in_flight",
)  # fmt: skip
MOST_MOMENTS = 300
MOST_PLACES = 16  # of long pipelines: the first, the last, the largest, and some between
UPDATE_SHARE = 0.04  # of the width, for the optimizer


@dataclass
class _Noting(Account):
    """An account that notes what is held after each line: the phase, and the bytes of each kind."""

    notes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def hold(self, storages: Iterable[int], node: Node | None = None) -> None:
        super().hold(storages, node)
        self.notes.append((self.phase, tuple(self.live)))


def memory_of_places(program: AnyProgram, table: MemoryTable, small: int = 1) -> tuple[Memory, ...]:
    """Of each pipeline rank of ``table``, which :func:`autopar.memory.table.memory_of` made of the same arguments.

    Raises InvariantError for a program that is not differentiated.
    """
    mesh = program.mesh.of_stage if isinstance(program, PipelinedProgram) else program.mesh
    tapes = Tapes(mesh, mesh.coordinates(mesh.world_size - 1), Operators())
    found = []
    for one in _some(table.ranks):
        account = _Noting()
        if isinstance(program, PipelinedProgram):
            pipelined_step(program, one.place, tapes, account, small)
        else:
            flat_step(program, tapes, account)
        found.append(_memory(one, account.notes))
    return tuple(found)


def fitted(largest: RankMemory, mesh: Mesh, plan: Plan, device: Device) -> document.Device:
    """Whether the largest rank fits, and what would help it."""
    changes = tuple((one.change, one.saves) for one in helps(mesh, plan, largest))
    return document.Device(device.bytes, device.needed(largest.peak), changes)


def _some(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    """All, or of many places those at equal distances and the largest."""
    if len(ranks) <= MOST_PLACES:
        return list(ranks)
    step = (len(ranks) - 1) / (MOST_PLACES - 2)
    wanted = {round(number * step) for number in range(MOST_PLACES - 1)}
    wanted.add(max(range(len(ranks)), key=lambda place: ranks[place].peak))
    return [ranks[place] for place in sorted(wanted)]


def _memory(rank: RankMemory, notes: Sequence[tuple[str, tuple[int, ...]]]) -> Memory:
    width = 1 - UPDATE_SHARE
    moments = list[Moment]()
    for at, (phase, found) in _highest(notes):
        held = _ordered({**dict(zip(KINDS, found)), STATES: rank.optimizer})
        moments.append(Moment(round(width * at / len(notes), 5), phase or "inputs", held))
    if rank.phase == UPDATE:
        held = _ordered(rank.at_peak)
        moments += [Moment(at, UPDATE, held) for at in (width, 1.0)]
    else:
        moments.append(Moment(1.0, moments[-1].phase, moments[-1].held))
    highest = max(range(len(moments)), key=lambda number: sum(moments[number].held))
    return Memory(rank.ranks, rank.place, ORDER, tuple(moments), highest, rank.peak)


def _ordered(held: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(held[kind] for kind in ORDER)


def _highest(notes: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[int, tuple[str, tuple[int, ...]]]]:
    """The notes with their numbers; of many, those where most is held among their neighbours."""
    step = max(1, -(-len(notes) // MOST_MOMENTS))
    for start in range(0, len(notes), step):
        at = max(range(start, min(start + step, len(notes))), key=lambda number: sum(notes[number][1]))
        yield at, notes[at]
