"""The content of a pipelined program, for people: its stages as a table, its schedule as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from autopar.ir.program import AnyProgram, Program
from autopar.pipeline.links import links_of
from autopar.pipeline.planned_schedule import most_in_flight
from autopar.pipeline.stage_table import StageTable, describe_stages
from autopar.pipeline.stages import Assignment, stages_of_nodes
from autopar.schedules.draw import draw
from autopar.schedules.instructions import Schedule
from autopar.schedules.svg import svg
from autopar.schedules.timing import Timeline, timeline


@dataclass(frozen=True)
class Pipeline:
    """``drawn``: in units of time, forward 1 and backward 2."""

    table: StageTable
    schedule: Schedule
    drawn: Timeline

    @property
    def title(self) -> str:
        ranks, stages = len(self.schedule.ranks), len(self.schedule.placement)
        sizes = f"{ranks} pipeline ranks, {stages} stages, {self.schedule.microbatches} microbatches"
        return f"schedule {self.schedule.name}: {sizes}, bubble {self.drawn.bubble:.2%} of the computing time"

    def print(self, console: Console, picture: bool) -> None:
        console.print(Text("stages, of one microbatch", style="bold"))
        console.print(Text(f"{self.table}\n"), soft_wrap=True)
        console.print(Text(self.title, style="bold"))
        if picture:
            console.print(draw(self.drawn, console.width))
        console.print()

    def write(self, path: Path) -> None:
        """The picture, as SVG."""
        path.write_text(svg(self.drawn, self.title), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        return {
            "stages": self.table.to_json(),
            "schedule": {
                "name": self.schedule.name,
                "microbatches": self.schedule.microbatches,
                "placement": list(self.schedule.placement),
                "bubble": self.drawn.bubble,
            },
        }


def pipeline_of(program: AnyProgram) -> Pipeline | None:
    """The stages and schedule of a program; None for a program that is not pipelined, or not finished."""
    if isinstance(program, Program) or program.schedule is None:
        return None
    names = stages_of_nodes(program)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    stage_of = {node: names[node.name] for node in calls if node.name in names}
    assignment = Assignment(stage_of, frozenset(node for node in calls if node not in stage_of))
    table = describe_stages(program.whole, assignment, most_in_flight(program.schedule))
    return Pipeline(table, program.schedule, timeline(program.schedule, links=links_of(program)))
