"""The schedules of a program beside that of its plan: forward only, backward only; and the links between its stages."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.program import PipelinedProgram
from autopar.pipeline.planned_schedule import forward_only
from autopar.pipeline.stages import crossings, types_of
from autopar.schedules.instructions import Compute, Kind, Link, Schedule
from autopar.schedules.messages import with_messages


def links_of(program: PipelinedProgram) -> tuple[Link, ...]:
    """The values that the stages of a differentiated program send each other, as schedules see them."""
    found = []
    for crossing in crossings(program):
        types = types_of(program, crossing)
        sent, returned = (tuple([types[name] for name in names]) for names in (crossing.names, crossing.grads))
        found.append(Link(crossing.source, crossing.target, sent, returned))
    return tuple(found)


def inference_schedule(program: PipelinedProgram) -> Schedule:
    """Forward only, with its messages."""
    return with_messages(forward_only(program.required_schedule), links_of(program))


def backward_schedule(program: PipelinedProgram) -> Schedule:
    """The backward passes after all forward ones: in reverse order of these, with messages."""
    forward = forward_only(program.required_schedule)
    orders = [reversed(list(forward.computes(rank))) for rank in range(len(forward.ranks))]
    ranks = [[Compute(Kind.B, step.stage, step.microbatch) for step in order] for order in orders]
    backward = replace(forward, name=f"{program.required_schedule.name} backward", ranks=tuple(map(tuple, ranks)))
    return with_messages(backward, links_of(program))
