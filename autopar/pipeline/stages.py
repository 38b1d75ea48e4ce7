"""A program cut into pipeline stages, each a complete program of its own.

    h = aten.linear(x, u)                 stage 0:  h = aten.linear(x, u)      return send 1.h = h
    y = aten.linear(h, w)          -->    stage 1:  h = recv 0.h
    return y                                        y = aten.linear(h, w)      return y

A value goes directly from the stage that makes it to each stage that uses it. A *duplicated* value is computed by each
stage that needs it, from the stage's own placeholders; so a parameter that two stages use (an embedding that is also
the output head) is a parameter of both.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from autopar.errors import InvariantError
from autopar.ir.fast_graph import copied_node
from autopar.ir.node import Node, origin, set_origin, set_values, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.mesh import PIPELINE


@dataclass(frozen=True)
class Assignment:
    """The stage of each call.

    ``stage_of``: every call that is not ``duplicated`` -> its stage, which never decreases along an edge of the graph.
    ``duplicated``: calls that each stage computes for itself if it needs their value, directly or for another of them;
    all their inputs are placeholders or duplicated. If the program returns one, the last stage returns it.
    """

    stage_of: Mapping[fx.Node, int]
    duplicated: frozenset[fx.Node]


def peer_of(entry: Input | Output) -> int:
    """The other stage of a value that is received or sent."""
    return int(entry.target.partition(".")[0])


def name_of(entry: Input | Output) -> str:
    """The name of the value in the stage that makes it."""
    return entry.target.partition(".")[2]


def stage_programs(program: Program, assignment: Assignment, count: int) -> tuple[Program, ...]:
    """The stages of ``program``, ``count`` of them, in the order of the model."""
    assignment = _with_parts(assignment)
    drafts = [_Stage(program, assignment, number) for number in range(count)]
    for node, entry in zip(program.returned, program.outputs):
        drafts[_stage_of_output(node, assignment, count)].give(node, entry)
    wanted = [draft.received() for draft in drafts]
    for target, received in enumerate(wanted):
        for node in received:
            drafts[assignment.stage_of[node]].give(node, Output(OutputKind.SENT, f"{target}.{node.name}"))
    return tuple(draft.program(received) for draft, received in zip(drafts, wanted))


def _with_parts(assignment: Assignment) -> Assignment:
    """The results of an operator with several results are in the stage of the operator."""
    stage_of, duplicated = dict(assignment.stage_of), set(assignment.duplicated)
    for node in [*stage_of, *duplicated]:
        if node.target is operator.getitem:
            source = node.all_input_nodes[0]
            if source in stage_of:
                stage_of[node] = stage_of[source]
                duplicated.discard(node)
    return Assignment(stage_of, frozenset(duplicated))


def _stage_of_output(node: Node, assignment: Assignment, count: int) -> int:
    """The stage that returns an output. A duplicated one is returned by the stage of its module, or by the last.

    Counters of batch norm are such outputs.
    """
    if node in assignment.stage_of:
        return assignment.stage_of[node]
    module = origin(node).module
    found = [stage for other, stage in assignment.stage_of.items() if module and origin(other).module == module]
    return found[0] if found else count - 1


class _Stage:
    """One stage being made."""

    def __init__(self, program: Program, assignment: Assignment, number: int) -> None:
        self.whole, self.assignment, self.number = program, assignment, number
        self.outputs: list[tuple[Node, Output]] = []

    def give(self, node: Node, entry: Output) -> None:
        self.outputs.append((node, entry))

    def received(self) -> list[Node]:
        """The values that other stages make, in the order of the whole program."""
        return [node for node in self._needed() if self._is_elsewhere(node)]

    def program(self, received: Sequence[Node]) -> Program:
        graph, copies = fx.Graph(), dict[Node, Node]()
        needed = self._needed()
        entries = self._entries
        given = [node for node in self.whole.graph.nodes if node.op == "placeholder" and self._takes(node, needed)]
        for node in (*given, *received):
            copies[node] = graph.placeholder(node.name)
        for node in needed:
            if node not in copies:
                copies[node] = copied_node(graph, node, copies.__getitem__)
        for node, copy in copies.items():
            set_values(copy, *values(node))
            set_origin(copy, origin(node))
        graph.output(tuple(copies[node] for node, _ in self.outputs))
        inputs = [replace(entries[node.name], node=copies[node].name) for node in given]
        for node in received:
            target = f"{self.assignment.stage_of[node]}.{node.name}"
            inputs.append(Input(copies[node].name, InputKind.RECEIVED, target))
        used = {entry.target for entry in inputs if entry.kind is InputKind.CONSTANT}
        return replace(
            self.whole,
            graph=graph,
            mesh=self.whole.mesh.of_stage,
            inputs=tuple(inputs),
            outputs=tuple(entry for _, entry in self.outputs),
            constants={name: tensor for name, tensor in self.whole.constants.items() if name in used},
            in_spec=None,
            out_spec=None,
            static_inputs=(),
            static_outputs=(),
            decisions={},
            pins=replace(self.whole.pins, stages={}),
            source=None,
        )

    def _needed(self) -> list[Node]:
        """The nodes that this stage computes, and all that they depend on, in the order of the whole program."""
        own = [node for node, stage in self.assignment.stage_of.items() if stage == self.number]
        wanted = [*own, *(node for node, _ in self.outputs)]
        found = ancestors(wanted, through=lambda node: not self._is_elsewhere(node))
        return [node for node in self.whole.graph.nodes if node in found]

    @cached_property
    def _entries(self) -> dict[str, Input]:
        return {entry.node: entry for entry in self.whole.inputs}

    def _takes(self, node: Node, needed: Container[Node]) -> bool:
        """Whether the input is needed, or a tensor that this stage holds since another program.

        That one's copies have to stay equal where this program uses it on fewer stages.
        """
        entry, homes = self._entries[node.name], self.whole.pins.homes
        names = (entry.target, *entry.aliases) if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER) else ()
        return node in needed or any(self.number in homes.get(name, ()) for name in names)

    def _is_elsewhere(self, node: Node) -> bool:
        return self.assignment.stage_of.get(node, self.number) != self.number


def stages_of_nodes(program: AnyProgram) -> dict[str, int]:
    """Node name -> stage, as decided by ``cut_stages``."""
    return {
        name: decision.stage
        for name, decision in program.decisions.get(PIPELINE, {}).items()
        if decision.stage is not None
    }


def users_of(program: PipelinedProgram) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer name -> the stages that hold it, in order."""
    found: dict[str, tuple[int, ...]] = {}
    for number, stage in enumerate(program.stages):
        for _, entry in stage.takes(InputKind.PARAMETER, InputKind.BUFFER):
            found[entry.target] = (*found.get(entry.target, ()), number)
    return found


def homes_of(program: AnyProgram) -> dict[str, tuple[int, ...]]:
    """As :func:`users_of`; {} without a pipeline."""
    return users_of(program) if isinstance(program, PipelinedProgram) else {}


def holders(program: AnyProgram) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer name, aliases too -> the pipeline ranks that hold it, in order.

    It is {} without a pipeline, where every rank holds all.
    """
    if isinstance(program, Program):
        return {}
    placement, used = program.required_schedule.placement, users_of(program)
    entries = [entry for _, entry in program.takes(InputKind.PARAMETER, InputKind.BUFFER)]
    return {
        name: tuple(sorted({placement[number] for number in used[entry.target]}))
        for entry in entries
        if entry.target in used
        for name in (entry.target, *entry.aliases)
    }


def held_elsewhere(program: AnyProgram, rank: int) -> frozenset[str]:
    """Names of parameters and buffers that only pipeline ranks other than ``rank`` hold."""
    return frozenset(name for name, ranks in holders(program).items() if rank not in ranks)


def first_ranks(program: AnyProgram) -> dict[str, int]:
    """Parameter or buffer name, aliases too -> the first pipeline rank that holds it."""
    return {name: ranks[0] for name, ranks in holders(program).items()}


EVEN = "Way out: a batch size that the microbatches divide, or Plan(cuts=...)."


def check_same_cut(program: PipelinedProgram, other: PipelinedProgram) -> None:
    """Raise InvariantError unless the stages of both programs have the same parameters, and send the same values."""
    first, second = users_of(program), users_of(other)
    for name, stages in first.items():
        if second.get(name, ()) != stages:
            raise InvariantError(
                f"parameter '{name}' is of stages {stages} in one microbatch, and of {second.get(name, ())} "
                f"in the smaller last one\n{EVEN}"
            )
    if set(crossings(program)) != set(crossings(other)):
        raise InvariantError(
            "the stages send each other other values in one microbatch than in the smaller last one: the model "
            f"computes otherwise for so few rows\n{EVEN}"
        )


# ---------------------------------------------------------------- what crosses


@dataclass(frozen=True)
class Crossing:
    """The values that go from stage ``source`` to stage ``target``: names in the source, in order; ``grads`` return."""

    source: int
    target: int
    names: tuple[str, ...]
    grads: tuple[str, ...]


Type = tuple[tuple[int, ...], torch.dtype]


def crossings(program: PipelinedProgram) -> Iterator[Crossing]:
    """The values that the stages of a differentiated program send each other."""
    for source, stage in enumerate(program.stages):
        names: dict[int, list[str]] = {}
        for entry in stage.outputs:
            if entry.kind is OutputKind.SENT:
                names.setdefault(peer_of(entry), []).append(name_of(entry))
        for target, sent in names.items():
            reached = gradients_of(program.stages[target])
            yield Crossing(source, target, tuple(sent), tuple(name for name in sent if f"{source}.{name}" in reached))


def gradients_of(stage: Program) -> frozenset[str]:
    """Targets of the received values of ``stage`` for which its backward pass has a gradient."""
    received = {entry.target for entry in stage.inputs if entry.kind is InputKind.RECEIVED}
    return frozenset(received.intersection(stage.required_role.grads))


def types_of(program: PipelinedProgram, crossing: Crossing) -> Mapping[str, Type]:
    """Name -> (local shape, dtype) of the values that cross."""
    stage = program.stages[crossing.target]
    ports = {entry.target: port for port, entry in stage.takes(InputKind.RECEIVED)}
    found = {name: ports[f"{crossing.source}.{name}"].value for name in crossing.names}
    return {name: (kind.layout.local_shape(stage.mesh), kind.dtype) for name, kind in found.items()}
