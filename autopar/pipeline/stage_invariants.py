"""Contracts about all stages of a pipelined program together: each raises InvariantError that names stage and value."""

from __future__ import annotations

from collections import Counter

from autopar.errors import InvariantError, ScheduleError
from autopar.ir.invariants import broken
from autopar.ir.node import Node, value
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.tables import InputKind, OutputKind
from autopar.pipeline.links import links_of
from autopar.pipeline.stages import gradients_of, name_of, peer_of
from autopar.schedules.check import check_schedule

HELD = (InputKind.PARAMETER, InputKind.BUFFER)


def is_not_cut(program: AnyProgram) -> None:
    if isinstance(program, PipelinedProgram):
        raise InvariantError("the program has stages already\nLikely fix: run this pass before cut_stages, once")


def is_not_scheduled(program: PipelinedProgram) -> None:
    if program.schedule is not None:
        raise InvariantError("the program has a schedule already\nLikely fix: run schedule_microbatches once, last")


def stages_are_of_the_mesh(program: PipelinedProgram) -> None:
    """Each stage is on the program's mesh without ``pp``."""
    for number, stage in enumerate(program.stages):
        if stage.mesh != program.mesh.of_stage:
            problem = f"stage {number} is on {stage.mesh}, the program on {program.mesh}"
            raise InvariantError(f"{problem}\nLikely fix: a stage is on the mesh without pp")


def what_is_sent_is_received(program: PipelinedProgram) -> None:
    """Each value that a stage sends is received once, with the same type, by the stage that it names.

    No stage receives a value that no stage sends.
    """
    sent: dict[tuple[int, int, str], Node] = {}
    together = "change the output of one stage and the input of the other together"
    for number, stage in enumerate(program.stages):
        for node, out in zip(stage.returned, stage.outputs):
            if out.kind is OutputKind.SENT:
                key = number, peer_of(out), name_of(out)
                if key in sent:
                    problem = f"stage {number} sends '{key[2]}' to stage {key[1]} twice"
                    raise broken(node, problem, "a value crosses once for each stage that uses it")
                sent[key] = node
    for number, stage in enumerate(program.stages):
        for node, entry in stage.placeholders(InputKind.RECEIVED):
            source = peer_of(entry)
            other = sent.pop((source, number, name_of(entry)), None)
            if other is None:
                problem = f"stage {number} receives '{name_of(entry)}' of stage {source}, which does not send it there"
                raise broken(node, problem, together)
            if _type(other) != _type(node):
                problem = f"stage {number} receives {_type(node)}, stage {source} sends {_type(other)}"
                raise broken(node, problem, together)
    for (source, target, name), node in sent.items():
        raise broken(node, f"stage {source} sends '{name}' to stage {target}, which does not receive it", together)


def _type(node: Node) -> str:
    return f"{str(value(node).dtype).removeprefix('torch.')}{value(node).layout}"


def stages_hold_the_parameters(program: PipelinedProgram) -> None:
    """Each parameter and buffer that the program uses is in a stage, laid out as in the program."""
    whole = {entry.target: node for node, entry in program.placeholders(*HELD)}
    held: set[str] = set()
    for number, stage in enumerate(program.stages):
        for node, entry in stage.placeholders(*HELD):
            held.add(entry.target)
            other = whole.get(entry.target)
            if other is None or _type(other) != _type(node):
                found = "has none" if other is None else f"has {_type(other)}"
                problem = f"stage {number} has '{entry.target}' as {_type(node)}, the program {found}"
                raise broken(node, problem, "change the stages and the program together")
    for name, node in whole.items():
        if name not in held and node.users:
            raise broken(node, f"no stage has '{name}'", "give it to each stage that uses it")


def stages_return_the_outputs(program: PipelinedProgram) -> None:
    """Each output of the program is returned by one stage, and a stage returns or sends nothing else."""
    counts = Counter(out for stage in program.stages for out in stage.outputs if out.kind is not OutputKind.SENT)
    for out in program.outputs:
        if counts[out] != program.outputs.count(out):
            problem = f"{out.kind.value} '{out.target}' is returned by {counts[out]} stages"
            raise InvariantError(f"{problem}\nLikely fix: leave it to the stage that computes it")
    for out in counts.keys() - set(program.outputs):
        problem = f"a stage returns {out.kind.value} '{out.target}', the program does not"
        raise InvariantError(f"{problem}\nLikely fix: change the outputs of stages and program together")


def gradients_are_sent_back(program: PipelinedProgram) -> None:
    """Where a stage's backward pass has a gradient of a received value, that of the sender takes one."""
    reached = [gradients_of(stage) for stage in program.stages]
    for number, stage in enumerate(program.stages):
        taken = set(stage.role.differentiable) if stage.role is not None else set()
        for position, out in enumerate(stage.outputs):
            if out.kind is not OutputKind.SENT:
                continue
            back = f"{number}.{name_of(out)}" in reached[peer_of(out)]
            if back != (position in taken):
                problem = f"stage {peer_of(out)} sends {'a' if back else 'no'} gradient of '{name_of(out)}' back, "
                problem += f"stage {number} {'takes none' if back else 'waits for one'}"
                raise broken(stage.returned[position], problem, "differentiate from the last stage to the first")


def schedule_fits_the_stages(program: PipelinedProgram) -> None:
    """There is a schedule of these stages, and its messages are those of the stages, in one order."""
    if program.schedule is None or len(program.schedule.placement) != len(program.stages):
        count = "no schedule" if program.schedule is None else f"a schedule of {len(program.schedule.placement)} stages"
        raise InvariantError(f"{len(program.stages)} stages and {count}\nLikely fix: schedule the stages after the cut")
    try:
        check_schedule(program.schedule, links_of(program))
    except ScheduleError as error:
        raise InvariantError(f"{error}\nLikely fix: insert the messages of these stages (with_messages)") from error
