"""A whole training step of a program as operations: forward and backward, or all instructions of a pipeline's schedule.

F0.3                     forward of stage 0 on microbatch 3
SEND F0.3 -> 1           its results, small ones in one piece
RECV B1.3 -> 0           what the backward pass of stage 1 gives back
B0.3
gather 0, reduce 0       what stage 0 does once in the step: whole parameters (``Plan(zero=1)``), gradients
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import fx

from autopar.autodiff.halves import BackwardSteps, backward_steps
from autopar.autodiff.hoist import without_gathers
from autopar.cost.machine import ACCELERATOR, Machine
from autopar.errors import InvariantError
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import PIPELINE
from autopar.pipeline.interpreter import Routes
from autopar.pipeline.stages import crossings, types_of
from autopar.schedules.instructions import Compute, Kind, Message, Send
from autopar.schedules.packing import Types, together
from autopar.traces.operations import NOTHING, Operation, Recording, Uses, What


def step_of(program: AnyProgram, place: int = 0, machine: Machine = ACCELERATOR) -> tuple[Operation, ...]:
    """The operations of the ranks at position ``place`` of the pipeline; without a pipeline, of every rank.

    Raises InvariantError for a program that is not differentiated.
    """
    if isinstance(program, PipelinedProgram):
        return _PipelineRank(program, place, machine).step()
    role, recording = program.required_role, Recording(machine)
    results = recording.run(program, role.forward, [NOTHING] * len(program.inputs), "forward", "forward")
    if role.backward is not None:
        saved = results[len(program.outputs) :]
        tangents = [results[position] for position in role.differentiable]
        recording.run(program, role.backward, [*saved, *tangents], "backward", "backward")
    return tuple(recording.operations)


Values = dict[str, Uses]  # "3.add_1": the value add_1 from or for stage 3


class _Stage:
    """A stage on the way through a step: what its graphs made until now."""

    def __init__(self, number: int, program: Program, recording: Recording) -> None:
        self.number, self.program, self.recording = number, program, recording
        self.forward: fx.Graph = program.required_role.forward
        self.whole: list[Uses] = []  # parameters that are gathered once in the step
        self.kept: dict[int, list[Uses]] = {}  # microbatch -> what its next compute takes
        self.partial: list[Uses] = []
        self.gather()

    @cached_property
    def steps(self) -> BackwardSteps | None:
        return backward_steps(self.program)

    def gather(self) -> None:
        parameters = {node.name for node, _ in self.program.placeholders(InputKind.PARAMETER)}
        found = without_gathers(self.forward, parameters) if self.program.plan.zero in (1, 2) else None
        if found is not None:
            self.forward, none = found.rest, [NOTHING] * len(found.parameters)
            run = f"gather {self.number}"
            self.whole = self.recording.run(self.program, found.graph, none, run, "forward")

    def compute(self, step: Compute, received: Values) -> Values:
        """The values that a compute sends to other stages."""
        if step.kind is Kind.F:
            return self._forward(step, received)
        if self.steps is None:
            return {}
        graph = {Kind.B: self.steps.whole, Kind.I: self.steps.inputs, Kind.W: self.steps.weights}[step.kind]
        given = self.kept.pop(step.microbatch)
        if step.kind is not Kind.W:
            given += self._tangents(received)
        results = self.recording.run(self.program, graph, given, str(step), "backward")
        at_once = self.steps.at_once if step.kind is not Kind.W else ()
        rest = results[len(at_once) :]
        if step.kind is Kind.I:
            self.kept[step.microbatch] = rest
        else:
            self.partial = [one | other for one, other in zip(self.partial, rest)] if self.partial else rest
        return dict(zip(at_once, results))

    def reduce(self) -> None:
        if self.steps is not None and self.partial:
            self.recording.run(self.program, self.steps.reduce, self.partial, f"reduce {self.number}", "backward")

    def _forward(self, step: Compute, received: Values) -> Values:
        entries = self.program.placeholders(*InputKind)
        given = [received[e.target] if e.kind is InputKind.RECEIVED else NOTHING for _, e in entries]
        results = self.recording.run(self.program, self.forward, [*given, *self.whole], str(step), "forward")
        outputs = self.program.outputs
        if self.steps is not None:
            self.kept[step.microbatch] = results[len(outputs) :]
        return {e.target: made for e, made in zip(outputs, results) if e.kind is OutputKind.SENT}

    def _tangents(self, grads: Values) -> list[Uses]:
        outputs = self.program.outputs
        return [grads.get(outputs[position].target, NOTHING) for position in self.program.required_role.differentiable]


class _PipelineRank:
    """The ranks at one position of the pipeline."""

    def __init__(self, program: PipelinedProgram, place: int, machine: Machine) -> None:
        self.program, self.place, self.recording = program, place, Recording(machine)
        self.schedule = program.required_schedule
        self.routes, self.types = Routes(program), types_of_messages(program)
        self.ready: dict[Message, list[Uses]] = {}
        self.stages = {n: _Stage(n, stage, self.recording) for n, stage in program.stages_on(place).items()}

    def step(self) -> tuple[Operation, ...]:
        for step in self.schedule.ranks[self.place]:
            if isinstance(step, Compute):
                self._compute(step)
            elif isinstance(step, Send):
                made = self.ready.pop(step.message)
                self._pieces(What.SEND, step.message, step.message.target, made)
            else:
                none = [NOTHING] * len(self.routes.names(step.message))
                self.ready[step.message] = self._pieces(What.RECEIVE, step.message, step.message.source, none)
        for stage in self.stages.values():
            stage.reduce()
        return tuple(self.recording.operations)

    def _compute(self, step: Compute) -> None:
        received: Values = {}
        for message in self.routes.flow.needs(step):
            values = self.ready.pop(message)
            self.recording.wait(NOTHING.union(*values))
            received |= {f"{message.source}.{name}": made for name, made in zip(self.routes.names(message), values)}
        made = self.stages[step.stage].compute(step, received)
        for message in self.routes.flow.makes(step):
            names = self.routes.names(message)
            self.ready[message] = [made.get(f"{message.target}.{name}", NOTHING) for name in names]

    def _pieces(self, what: What, message: Message, other: int, made: list[Uses]) -> list[Uses]:
        """Add the pieces in which a message travels. Gives, for each of its values, the piece that has it."""
        types = self.types[message.kind, message.source, message.target]
        peer = self.schedule.placement[other]
        channel = f"{what} {peer}"
        found = list(made)
        for positions in together(types):
            size = sum(math.prod(types[at][0]) * types[at][1].itemsize for at in positions)
            uses = NOTHING.union(*(made[at] for at in positions))
            piece = self.recording.message(what, str(message), str(message), uses, size, peer - self.place, channel)
            for at in positions:
                found[at] = piece
        return found


Key = tuple[int, int]  # position on the pipeline, number of the operation there


def check_messages(steps: Sequence[Sequence[Operation]]) -> None:
    """Raise InvariantError unless each message has both ends, as :func:`pairs` does."""
    for _ in pairs(steps):
        pass


def pairs(steps: Sequence[Sequence[Operation]]) -> Iterator[tuple[Key, Key]]:
    """Each receive with its send; ``steps`` are those of all positions on the pipeline.

    Raises InvariantError for a message that has one end only, or is another one there.
    """
    ends: dict[tuple[What, int, int, int], Key] = {}
    for place, step in enumerate(steps):
        for number, one in enumerate(step):
            if one.what in (What.SEND, What.RECEIVE):
                way = (place, place + one.step) if one.what is What.SEND else (place + one.step, place)
                ends[one.what, *way, one.tag] = place, number
    for (what, source, target, tag), key in ends.items():
        other = ends.get((What.RECEIVE if what is What.SEND else What.SEND, source, target, tag))
        mine, theirs = steps[key[0]][key[1]], None if other is None else steps[other[0]][other[1]]
        if theirs is None or (mine.name, mine.bytes) != (theirs.name, theirs.bytes):
            found = "nothing" if theirs is None else f"{theirs.name} of {theirs.bytes} bytes"
            raise InvariantError(
                f"the pipeline ranks {source} and {target} do not agree on message {tag} between them: "
                f"to {what} {mine.name} of {mine.bytes} bytes is met by {found}\n"
                "Way out: a schedule that autopar.schedules.check accepts; this is a fault of the trace otherwise."
            )
        if what is What.RECEIVE and other is not None:
            yield key, other


def types_of_messages(program: PipelinedProgram) -> Mapping[tuple[Kind, int, int], Types]:
    """Of each message (kind, stage that makes it, stage that takes it) the shapes and dtypes of its values."""
    found: dict[tuple[Kind, int, int], Types] = {}
    for crossing in crossings(program):
        types = types_of(program, crossing)
        found[Kind.F, crossing.source, crossing.target] = [types[name] for name in crossing.names]
        found[Kind.B, crossing.target, crossing.source] = [types[name] for name in crossing.grads]
    return found


def places_of(program: AnyProgram) -> range:
    """The positions on the pipeline: one for each role."""
    return range(program.mesh.size(PIPELINE))
