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

import torch

from autopar.errors import InvariantError
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import origin, value
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.reach import descendants
from autopar.ir.tables import Decision, OutputKind
from autopar.mesh import PIPELINE
from autopar.pipeline.assignment import assign_stages
from autopar.pipeline.planned_schedule import most_in_flight, planned_schedule
from autopar.pipeline.stage_invariants import is_not_cut
from autopar.pipeline.stages import Assignment, stage_programs

aten = torch.ops.aten


@graph_pass(requires=(is_not_cut,), when=lambda program: program.mesh.is_pipelined)
def cut_stages(program: Program) -> PipelinedProgram:
    _refuse_statistics(program)
    schedule = planned_schedule(program.plan, program.mesh)
    count = len(schedule.placement)
    assignment = _pinned(program) or assign_stages(program, count, most_in_flight(schedule))
    stages = stage_programs(program, assignment, count)
    named = {node.name: Decision(f"stage {stage}", stage=stage) for node, stage in assignment.stage_of.items()}
    return replace(program, decisions={**program.decisions, PIPELINE: named}).cut_into(stages)


def _refuse_statistics(program: Program) -> None:
    """Raise InvariantError for batch norm in training: no split of one batch into several has its statistics.

    They may be those of each microbatch where the plan has said that of its loss.
    """
    count, found = program.plan.microbatches, _normalised(program)
    if count == 1 or not found or program.plan.microbatch_weights != "exact":
        return
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise InvariantError(
        f"'{found[0]}'{more} normalise by statistics of the batch; each of {count} microbatches has others, so that "
        "the step would not be that of the unmodified model\n"
        'Way out: Plan(microbatch_weights="statistics") for those of each microbatch, as in accumulating gradients by '
        "hand,\nnorms over features (LayerNorm, GroupNorm), BatchNorm in eval mode, or Plan(microbatches=1)."
    )


def _normalised(program: Program) -> list[str]:
    """The modules that normalise by statistics of the batch; ``instance_norm`` is a batch norm of one row."""
    updated = [entry.target for entry in program.outputs if entry.kind is OutputKind.BUFFER_UPDATE]
    names = [name.removesuffix(".running_mean") for name in updated if name.endswith("running_mean")]
    for node in program.graph.nodes:
        functional = node.target is aten._native_batch_norm_legit_functional.default and node.args[5]
        alone = node.target is aten._native_batch_norm_legit.no_stats
        if functional or (alone and value(node.args[0]).shape[0] > 1):
            names.append(origin(node).module or node.name)
    return list(dict.fromkeys(names))


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
