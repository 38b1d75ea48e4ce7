"""From the plan to the schedule of the pipeline, without messages: these need the program's stages."""

from __future__ import annotations

from dataclasses import replace

from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.schedule import Kind, Schedule, make_schedule


def planned_schedule(plan: Plan, mesh: Mesh) -> Schedule:
    """The schedule that ``plan`` asks for on the pipeline ranks of ``mesh``.

    Raises ValueError for one that does not go with the mesh.
    """
    return make_schedule(plan.schedule, mesh.size("pp"), plan.microbatches, plan.virtual_stages)


def forward_only(schedule: Schedule) -> Schedule:
    """The forward computes of ``schedule``, without messages: for inference."""
    forward = [[step for step in schedule.computes(rank) if step.kind is Kind.F] for rank in range(len(schedule.ranks))]
    return replace(schedule, name=f"{schedule.name} forward", ranks=tuple(map(tuple, forward)))
