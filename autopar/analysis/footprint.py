"""The bytes that a rank of a program holds and sends, from its graphs: nothing is run, so any mesh and size will do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from autopar.autodiff.halves import backward_steps
from autopar.autodiff.hoist import without_gathers, without_reductions
from autopar.ir import collectives as comm
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind
from autopar.ir.traffic import Transfer, bytes_of, moved_bytes
from autopar.mesh import PIPELINE, REPLICA_AXES, Mesh
from autopar.pipeline.links import links_of
from autopar.pipeline.stages import holders
from autopar.schedules.instructions import Kind, Schedule, Send
from autopar.schedules.packing import together


@dataclass(frozen=True)
class Holdings:
    """Bytes of parameters: those of the model, those of one rank, and those that each axis splits (of the model's).

    On a pipeline, ``rank`` is a rank of the stages that have most, and ``pp`` splits the parameters that not every rank
    has.
    """

    whole: int
    rank: int
    split: Mapping[str, int]


def held(program: AnyProgram) -> Holdings:
    """The parameters of one rank; where a split is uneven, those of the rank that has most."""
    whole = 0
    split = {axis: 0 for axis, size in program.mesh.axes if size > 1}
    unscheduled = isinstance(program, PipelinedProgram) and program.schedule is None
    owners = {} if unscheduled else holders(program)
    places = range(program.mesh.size(PIPELINE))
    ranks = [0 for _ in places]
    for node, entry in program.placeholders(InputKind.PARAMETER):
        kind = value(node)
        whole += bytes_of(kind)
        part = bytes_of(kind, program.mesh)
        here = owners.get(entry.target, places)
        for place in here:
            ranks[place] += part
        for axis in kind.layout.axes:
            split[axis] = split.get(axis, 0) + bytes_of(kind)
        if len(here) < len(places):
            split[PIPELINE] += bytes_of(kind)
    return Holdings(whole, max(ranks), split)


def sent(program: AnyProgram, rank: int = 0) -> tuple[Transfer, ...]:
    """The bytes that ``rank`` sends in one step, by phase, axis and collective; before ``differentiate`` forward only.

    All microbatches count as the first, which is as large as any.
    """
    place = program.mesh.coordinates(rank).get(PIPELINE, 0)
    if isinstance(program, PipelinedProgram) and program.schedule is not None:
        return _sent_by_stages(program, program.schedule, place)
    if not isinstance(program, Program) or program.role is None:
        return _transfers(program.graph, program.mesh, "forward")
    graphs = _graphs_without_pipeline(program, program.plan.microbatches)
    return _added(_times(graph, program.mesh, phase, times) for phase, graph, times in graphs)


def sent_by_activations(program: Program) -> tuple[Transfer, ...]:
    """What a rank sends in one microbatch of a program without a pipeline, but for gradients of parameters."""
    role = program.required_role
    found = [_transfers(role.forward, program.mesh, "forward")]
    if role.backward is not None:
        found.append(_transfers(without_reductions(role.backward, REPLICA_AXES).rest, program.mesh, "backward"))
    return _added(found)


def _graphs_without_pipeline(program: Program, microbatches: int) -> Iterator[tuple[str, fx.Graph, int]]:
    """(phase, graph, how often it runs in a step)."""
    role = program.required_role
    yield from _forward_graphs(program, microbatches)
    if role.backward is None:
        return
    if microbatches == 1:
        yield "backward", role.backward, 1
        return
    cut = without_reductions(role.backward, REPLICA_AXES if program.plan.zero < 2 else ())
    yield "backward", cut.rest, microbatches
    yield "backward", cut.graph, 1


def _sent_by_stages(program: PipelinedProgram, schedule: Schedule, place: int) -> tuple[Transfer, ...]:
    """The bytes of a rank of the pipeline: its stages' collectives (once, or for each microbatch) and messages."""
    stages = program.stages_on(place).values()
    found = [
        _times(graph, stage.mesh, phase, times)
        for stage in stages
        for phase, graph, times in _graphs(stage, schedule.microbatches)
    ]
    types = {(link.source, link.target): link for link in links_of(program)}
    for step in schedule.ranks[place]:
        if isinstance(step, Send):
            forward = step.kind is Kind.F
            link = types[(step.stage, step.peer) if forward else (step.peer, step.stage)]
            tensors = link.values if forward else link.grads
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
            pieces = len(together(tensors))
            found.append((Transfer("forward" if forward else "backward", PIPELINE, "send", pieces, size),))
    return _added(found)


def _times(graph: fx.Graph, mesh: Mesh, phase: str, times: int) -> tuple[Transfer, ...]:
    return tuple(
        replace(one, operations=times * one.operations, bytes=times * one.bytes)
        for one in _transfers(graph, mesh, phase)
    )


def _added(found: Iterable[Sequence[Transfer]]) -> tuple[Transfer, ...]:
    total: dict[tuple[str, str, str], Transfer] = {}
    for one in itertools.chain.from_iterable(found):
        key = one.phase, one.axis, one.name
        before = total.get(key, Transfer(*key, 0, 0))
        total[key] = Transfer(*key, before.operations + one.operations, before.bytes + one.bytes)
    return tuple(total.values())


def _graphs(stage: Program, microbatches: int) -> Iterator[tuple[str, fx.Graph, int]]:
    """(phase, graph, how often it runs in a step) of one stage."""
    yield from _forward_graphs(stage, microbatches)
    steps = backward_steps(stage)
    if steps is not None:
        yield "backward", steps.whole, microbatches
        yield "backward", steps.reduce, 1


def _forward_graphs(program: Program, microbatches: int) -> Iterator[tuple[str, fx.Graph, int]]:
    role, gathering = program.required_role, None
    if program.plan.zero in (1, 2):
        gathering = without_gathers(role.forward, {node.name for node, _ in program.placeholders(InputKind.PARAMETER)})
    if gathering is not None:
        yield "forward", gathering.graph, 1
    yield "forward", role.forward if gathering is None else gathering.rest, microbatches


def _transfers(graph: fx.Graph, mesh: Mesh, phase: str) -> tuple[Transfer, ...]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for node in graph.nodes:
        name = comm.moving(node.target)
        if name is None:
            continue
        if comm.is_idle(node, mesh):
            continue
        source, axis, *_ = comm.arguments_of(node).values()
        operations, moved = found.get((axis, name), (0, 0))
        size = bytes_of(value(source), mesh)
        found[axis, name] = operations + 1, moved + moved_bytes(name, mesh.size(axis), size)
    return tuple(Transfer(phase, axis, name, *counts) for (axis, name), counts in found.items())
