"""The stages of a deep model as they will be cut, with fewer blocks in each: these compile in seconds.

The deep program is written by repeating a block, and the compiler's own search cuts it. Then every stage loses equally
many of its whole blocks, so that all that crosses a cut stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from autopar.compiler import finish_program
from autopar.fitting.repeated import repeated
from autopar.ir.node import Node
from autopar.ir.program import PipelinedProgram, Program
from autopar.pipeline.assignment import assign_stages
from autopar.pipeline.planned_schedule import most_in_flight, planned_schedule
from autopar.pipeline.stages import Assignment, stage_programs

Stages = tuple[Mapping[int, int], ...]  # of a block: the place of a call in it -> stage; last, of the rest


class Shallow:
    """``base``: split over a mesh, not yet cut, with three blocks of the list ``name``; ``blocks``: as many as it has.

    Raises NotAlike where these are not alike, StageError where there is no cut.
    """

    def __init__(self, base: Program, name: str, blocks: int) -> None:
        self.base, self.name, self.blocks = base, name, blocks
        self.schedule = planned_schedule(base.plan, base.mesh)
        self.count = len(self.schedule.placement)
        self.deep = repeated(base, name, blocks)
        self.cut = assign_stages(self.deep.program, self.count, most_in_flight(self.schedule))
        self.stages: Stages = tuple(_stages(calls, self.cut) for calls in self.deep.calls)

    @cached_property
    def spare(self) -> int:
        """Whole blocks of each stage that can be left out."""
        return max(0, min(min(len(found) for found in self._droppable), self.blocks - 3))

    @cached_property
    def _droppable(self) -> Sequence[Sequence[int]]:
        """For each stage its whole blocks but one; the first and the last block of the model always stay."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        for number in range(self.blocks):
            own = set(self.stages[number].values())
            if len(own) == 1:
                found[own.pop()].append(number)
        return [
            [number for number in numbers[1:] if number < self.blocks - 1] if stage < self.count - 1 else numbers[:-1]
            for stage, numbers in enumerate(found)
        ]

    def compiled(self, fewer: int) -> PipelinedProgram:
        """The finished program with ``fewer`` blocks in each stage."""
        left_out = {number for numbers in self._droppable for number in numbers[:fewer]}
        kept = [number for number in range(self.blocks) if number not in left_out]
        short = self.deep if not fewer else repeated(self.base, self.name, len(kept))
        stages = [*(self.stages[number] for number in kept), self.stages[-1]]
        stage_of = {
            node: stages[group][place]
            for group, calls in enumerate(short.calls)
            for place, node in enumerate(calls)
            if place in stages[group]
        }
        duplicated = frozenset(node for calls in short.calls for node in calls if node not in stage_of)
        order = {node: stage_of[node] for node in short.program.graph.nodes if node in stage_of}
        cut = short.program.cut_into(stage_programs(short.program, Assignment(order, duplicated), self.count))
        found = finish_program(replace(cut, plan=self.base.plan))
        assert isinstance(found, PipelinedProgram)
        return found


def _stages(calls: Sequence[Node], cut: Assignment) -> Mapping[int, int]:
    return {place: cut.stage_of[node] for place, node in enumerate(calls) if node in cut.stage_of}
