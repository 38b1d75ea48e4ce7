"""Cut the forward graph into pipeline stages of equal cost, at the edges over which the fewest bytes go.

before, on mesh(pp=2), Plan(microbatches=2):
  x = input             : f32[6,8]
  u = param u           : f32[8,8]
  w = param w           : f32[8,8]
  h = aten.linear(x, u) : f32[6,8]
  y = aten.linear(h, w) : f32[6,8]
  return y
after:
  stage 0 of 2 mesh()
    x = input             : f32[6,8]
    u = param u           : f32[8,8]
    h = aten.linear(x, u) : f32[6,8]
    return send 1.h=h
  stage 1 of 2 mesh()
    w = param w           : f32[8,8]
    h = recv 0.h          : f32[6,8]
    y = aten.linear(h, w) : f32[6,8]
    return y

:mod:`autopar.pipeline.assignment` chooses the cut points; parameters go with their users. A stage is a program of its
own on the rest of the mesh, and is differentiated by itself. (Huang et al. 2019, GPipe; Narayanan et al. 2021,
Megatron-LM.)
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph_pass import graph_pass
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.reach import descendants
from autopar.ir.tables import Decision
from autopar.mesh import PIPELINE
from autopar.pipeline.assignment import assign_stages
from autopar.pipeline.planned_schedule import most_in_flight, planned_schedule
from autopar.pipeline.stage_invariants import is_not_cut
from autopar.pipeline.stages import Assignment, stage_programs


@graph_pass(requires=(is_not_cut,), when=lambda program: program.mesh.is_pipelined)
def cut_stages(program: Program) -> PipelinedProgram:
    schedule = planned_schedule(program.plan, program.mesh)
    count = len(schedule.placement)
    assignment = _pinned(program) or assign_stages(program, count, most_in_flight(schedule))
    stages = stage_programs(program, assignment, count)
    named = {node.name: Decision(f"stage {stage}", stage=stage) for node, stage in assignment.stage_of.items()}
    return replace(program, decisions={**program.decisions, PIPELINE: named}).cut_into(stages)


def _pinned(program: Program) -> Assignment | None:
    """The pinned cut: that of a program of the same nodes, whose parameters are where it put them.

    Nodes that it does not have are computed by each stage, and so only from what each can have.
    """
    names = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    pinned = program.pins.stages
    if not pinned or not names.keys() >= pinned.keys():
        return None
    stage_of = {names[name]: stage for name, stage in pinned.items()}
    further = frozenset(node for node in names.values() if node not in stage_of)
    return None if further & descendants(stage_of) else Assignment(stage_of, further)
