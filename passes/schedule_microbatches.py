"""Give every pipeline rank its instructions: which stage runs when on which microbatch, and which messages it sends.

before, on mesh(pp=2), Plan(microbatches=2):
  stage 0 of 2 mesh()
  forward:
    w = param w      : f32[6,8]
    h = aten.relu(w) : f32[6,8]
    return send 1.h=h
  backward:
    grad_h = grad 1.h : f32[6,8]
    return w=grad_h
  stage 1 of 2 mesh()
  forward:
    h = recv 0.h    : f32[6,8]
    y = aten.sum(h) : f32[]
    return y
  backward:
    grad_y = grad at 0                    : f32[]
    expand = aten.expand(grad_y, [6, 8])  : f32[6,8]
    return 0.h=expand
after:
  schedule 1f1b microbatches=2 placement=0,1
    rank 0: F0.0 SEND F0.0 -> 1 RECV B1.0 -> 0 F0.1 SEND F0.1 -> 1 RECV B1.1 -> 0 B0.0 B0.1
    rank 1: RECV F0.0 -> 1 F1.0 RECV F0.1 -> 1 B1.0 SEND B1.0 -> 0 F1.1 B1.1 SEND B1.1 -> 0

The schedule is checked before any rank runs it.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import value
from autopar.ir.program import PipelinedProgram
from autopar.ir.tables import InputKind
from autopar.notes import warn
from autopar.pipeline.links import links_of
from autopar.pipeline.planned_schedule import planned_schedule
from autopar.pipeline.stage_invariants import is_not_scheduled
from autopar.pipeline.stages import holders
from autopar.schedules.check import check_schedule
from autopar.schedules.messages import with_messages
from autopar.schedules.timing import timeline


@graph_pass(requires=(is_not_scheduled,), when=lambda program: isinstance(program, PipelinedProgram), copies=False)
def schedule_microbatches(program: PipelinedProgram) -> PipelinedProgram:
    schedule, links = planned_schedule(program.plan, program.mesh), links_of(program)
    if not schedule.has_messages:
        schedule = with_messages(schedule, links)
    check_schedule(schedule, links)
    ranks, count = len(schedule.ranks), schedule.microbatches
    if count < ranks:
        idle = timeline(schedule, links=links).bubble
        warn(
            f"{count} microbatch{'es' * (count > 1)} for {ranks} pipeline ranks: schedule {schedule.name} has a bubble "
            f"of {idle:.0%} of the computing time\n"
            f"Way out: Plan(microbatches={2 * ranks}), or more, if the batch has as many rows.",
            stacklevel=2,
        )
    found = replace(program, schedule=schedule)
    without = sorted(set(range(ranks)).difference(*holders(found).values()))
    if without and any(value(node).requires_grad for node, _ in program.placeholders(InputKind.PARAMETER)):
        ranks_of = f"pipeline rank{'s' * (len(without) > 1)} {', '.join(map(str, without))} of {ranks}"
        warn(
            f"{ranks_of} will hold no parameter, and torch's optimizers refuse to be made of none\n"
            "Way out: Mesh(pp=...) with fewer ranks, or, where list(model.parameters()) is empty, no optimizer.",
            stacklevel=2,
        )
    return found
