"""The schedule of a plan, without messages: these need the program's stages."""

from __future__ import annotations

from dataclasses import replace

from autopar.mesh import PIPELINE, Mesh
from autopar.plan import Plan
from autopar.schedules.instructions import Kind, Schedule
from autopar.schedules.named import make_schedule
from autopar.schedules.text import parse_schedule


def planned_schedule(plan: Plan, mesh: Mesh) -> Schedule:
    """The schedule that ``plan`` names, on the pipeline ranks of ``mesh``.

    Raises ValueError for one that does not fit the mesh, ScheduleError for a written one with mistakes.
    """
    ranks = mesh.size(PIPELINE)
    if ":" not in plan.schedule:
        return make_schedule(plan.schedule, ranks, plan.microbatches, plan.virtual_stages)
    written = parse_schedule(plan.schedule)
    sizes = len(written.ranks), written.microbatches
    if sizes != (ranks, plan.microbatches):
        raise ValueError(
            f"Plan(schedule=...) is written for {sizes[0]} pipeline ranks and {sizes[1]} microbatches; "
            f"{mesh} has {ranks}, the plan {plan.microbatches}\nWay out: the same numbers in both."
        )
    return written


def forward_only(schedule: Schedule) -> Schedule:
    """The forward computes of ``schedule``, without messages, for inference."""
    forward = [[step for step in schedule.computes(rank) if step.kind is Kind.F] for rank in range(len(schedule.ranks))]
    return replace(schedule, name=f"{schedule.name} forward", ranks=tuple(map(tuple, forward)))


def most_in_flight(schedule: Schedule) -> list[int]:
    """For each stage, the most microbatches whose activations it holds at once."""
    held, most = [0] * len(schedule.placement), [0] * len(schedule.placement)
    for rank in range(len(schedule.ranks)):
        for step in schedule.computes(rank):
            held[step.stage] += (step.kind is Kind.F) - (step.kind in (Kind.B, Kind.W))
            most[step.stage] = max(most[step.stage], held[step.stage])
    return most
