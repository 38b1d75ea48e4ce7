"""The memory of ranks as a table and as JSON, with what does not fit a device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Group
from rich.text import Text

from autopar.commands.bundles import option
from autopar.commands.known_names import OPTIMIZERS
from autopar.commands.tables import table
from autopar.mesh import Mesh
from autopar.plan import Plan

if TYPE_CHECKING:  # which import torch
    from autopar.ir.program import AnyProgram
    from autopar.memory.device import Device
    from autopar.memory.table import MemoryTable, RankMemory

MOST_HELPS = 3
ROWS = (  # what it is called, the attribute that has the most of it at once, its kind at the peak
    ("parameters", "parameters", "parameters"),
    ("gradients", "gradients", "gradients"),
    ("optimizer states", "optimizer", "optimizer"),
    ("activations kept for backward", "activations", "activations"),
    ("gathered parameters, casts", "gathered", "gathered"),
    ("collectives under way", "in_flight", "in_flight"),
    ("buffers, constants", "", "buffers"),
    ("inputs", "", "inputs"),
    ("working memory of backward", "", "working"),
)


@dataclass(frozen=True)
class MemoryChoices:
    """Whose states count as memory, and the device that it has to fit; None: any."""

    optimizer: str = "adamw"
    device: Device | None = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        names = f"whose states count as memory: {', '.join(OPTIMIZERS)}"
        return [
            option("optimizer", Annotated[str, typer.Option("--optimizer", metavar="NAME", help=names)], "adamw"),
            option(
                "device_memory",
                Annotated[
                    str | None,
                    typer.Option("--device-memory", metavar="SIZE", help="say what does not fit: 80GB, 80GiB"),
                ],
            ),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for an optimizer that is not known, and for what is no size."""
        from autopar.memory.device import Device, read_size
        from autopar.memory.optimizers import optimizer_named

        optimizer_named(given["optimizer"])
        size = given["device_memory"]
        return cls(given["optimizer"], None if size is None else Device(read_size(size)))

    def of_program(self, program: AnyProgram, batch: Mapping[str, Any]) -> MemoryTable:
        """``batch``: that of a step, whose last microbatches may be smaller."""
        from autopar.memory.table import memory_of
        from autopar.pipeline.microbatches import smaller

        return memory_of(program, self.optimizer, small=smaller(batch, program.mesh, program.plan))

    def tables(self, program: AnyProgram, batch: Mapping[str, Any] | None, rank: int = 0) -> list[Group]:
        """For people; none where there is no batch, since the program is not finished."""
        if batch is None:
            return []
        found = self.of_program(program, batch)
        return [
            memory_table(found, program.mesh, program.plan, rank, self.device),
            *(Group(Text(line), Text()) for line in self._uneven(program, batch, found)),
        ]

    def _uneven(self, program: AnyProgram, batch: Mapping[str, Any], found: MemoryTable) -> Iterator[str]:
        """What the load of experts may add, where ranks send them rows; with a ``capacity_factor`` nothing."""
        from autopar.ir.traffic import size_text
        from autopar.memory.table import sends_rows

        if sends_rows(program):
            peak = self._largest_uneven(program, batch)
            more = size_text(peak - found.largest.peak)
            yield f"rows for experts: an even load; if all tokens choose those of one rank: + {more}, {size_text(peak)}"

    def _largest_uneven(self, program: AnyProgram, batch: Mapping[str, Any]) -> int:
        from autopar.memory.table import memory_of
        from autopar.pipeline.microbatches import smaller

        small = smaller(batch, program.mesh, program.plan)
        return memory_of(program, self.optimizer, small=small, timeline=False, uneven=True).largest.peak

    def document(self, program: AnyProgram, batch: Mapping[str, Any] | None) -> dict[str, Any]:
        """As JSON, under ``memory``."""
        from autopar.memory.table import sends_rows

        if batch is None:
            return {}
        found = self.of_program(program, batch)
        document = memory_json(found, program.mesh, program.plan, self.device)
        if sends_rows(program):
            document["uneven_peak"] = self._largest_uneven(program, batch)
        return {"memory": document}


def memory_table(found: MemoryTable, mesh: Mesh, plan: Plan, rank: int, device: Device | None) -> Group:
    """Of ``rank``, and of the ranks that hold most where these are others."""
    from autopar.ir.traffic import size_text

    own, largest = found.of(rank), found.largest
    shown = [own] if largest is own or largest.peak == own.peak else [own, largest]
    rows = [(name, *_cells(shown, most, kind)) for name, most, kind in ROWS]
    rows.append(("peak", *(cell for one in shown for cell in ("", size_text(one.peak)))))
    columns = ["", *(name for one in shown for name in (f"{one.ranks}: most", "at the peak"))]
    lines = [f"largest of {one.ranks} in: {one.phase}{f', at {one.where}' * bool(one.where)}" for one in shown]
    lines += verdict(largest, mesh, plan, device) if device is not None else []
    title = f"memory in a training step, {found.optimizer}"
    return Group(table(title, columns, rows), *map(Text, lines), Text())


def _cells(shown: list[RankMemory], most: str, kind: str) -> Iterator[str]:
    from autopar.ir.traffic import size_text

    for one in shown:
        yield size_text(getattr(one, most)) if most else ""
        yield size_text(one.at_peak[kind])


def verdict(one: RankMemory, mesh: Mesh, plan: Plan, device: Device) -> list[str]:
    """Whether it fits, with the allowance; if not, by how much, and what would help."""
    from autopar.ir.traffic import size_text
    from autopar.memory.device import helps

    needed, over = device.needed(one.peak), device.over(one.peak)
    allowance = f"{size_text(device.fixed)} for driver and NCCL, {device.share:.0%} for the allocator"
    sums = f"{size_text(one.peak)} of tensors, {allowance}: {size_text(needed)} of {size_text(device.bytes)}"
    if over <= 0:
        return [f"fits: {sums}"]
    changes = [f"  {change.change}: about {size_text(change.saves)} less" for change in helps(mesh, plan, one)]
    return [f"does not fit, by {size_text(over)}: {sums}", "what would help:", *changes[:MOST_HELPS]]


def memory_json(found: MemoryTable, mesh: Mesh, plan: Plan, device: Device | None) -> dict[str, Any]:
    from autopar.memory.device import helps

    document = found.to_json()
    if device is not None:
        largest = found.largest
        document["device"] = {
            "bytes": device.bytes,
            "allowance_bytes": device.fixed,
            "allowance_share": device.share,
            "needed_bytes": device.needed(largest.peak),
            "fits": device.over(largest.peak) <= 0,
            "helps": [{"change": one.change, "saves_bytes": one.saves} for one in helps(mesh, plan, largest)],
        }
    return document
