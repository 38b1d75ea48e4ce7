"""What each rank does that others wait for: collectives, messages between stages, in the order of its own code.

rank 0: all_reduce over tp (forward, line 31)   send F0.0 -> 1   post F1.0 -> 0 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from autopar.autodiff.halves import backward_steps
from autopar.codegen.python import RankProgram, emit
from autopar.ir import collectives as comm
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.mesh import PIPELINE, Mesh
from autopar.pipeline.links import links_of
from autopar.proof.rank_lines import Code, axis_of, read_code
from autopar.proof.rank_operands import operand_of, returned_of, walked
from autopar.runtime.rank_graphs import INPUTS, REDUCE, WEIGHTS, WHOLE, model_graphs, stage_graphs
from autopar.schedules.instructions import Compute, Flow, Kind, Message, Send

FUNCTIONS = {Kind.B: WHOLE, Kind.I: INPUTS, Kind.W: WEIGHTS}  # what a compute of a schedule runs; F: the learning one


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective on one rank. ``tag``: what all ranks of the group must agree on, in words.

    ``name``, ``operand``: the variable that is sent; where that is compared, the digest of what it comes from.
    """

    axis: str
    tag: str
    where: str
    name: str = ""
    operand: str = ""

    def __str__(self) -> str:
        return f"{self.tag} ({self.where})"


@dataclass(frozen=True, slots=True)
class Sending:
    """A message leaves. ``place``: on axis ``pp``, that of the rank which takes it."""

    message: Message
    place: int

    def __str__(self) -> str:
        return f"SEND {self.message}"


@dataclass(frozen=True, slots=True)
class Posting:
    """There is memory for a message. ``place``: that of the rank which sends it."""

    message: Message
    place: int

    def __str__(self) -> str:
        return f"RECV {self.message}"


@dataclass(frozen=True, slots=True)
class Taking:
    """``what`` needs a message. ``place``: that of the rank which sends it."""

    message: Message
    place: int
    what: str

    def __str__(self) -> str:
        return f"{self.what}, which needs {self.message}"


Event = Collective | Sending | Posting | Taking


def collectives_of(code: Code, mesh: Mesh, compared: bool = False) -> tuple[Collective, ...]:
    """The collectives of a function that any rank waits for: those over an axis of more than one rank.

    ``compared``: with the digests of their operands.
    """
    found = []
    lines = walked(code) if compared else ()
    operands = {line.number: operand_of(line, known) for line, known in lines if line is not None and line.given}
    for line in code.collectives():
        axis = axis_of(line)
        if mesh.size(axis) > 1:
            more = {key: value for key, value in line.given.items() if key not in ("x", "axis")}
            words = ", ".join([line.type, *(f"{key}={value}" for key, value in more.items() if key not in _LOCAL)])
            name = comm.moving(getattr(comm.OPS, line.collective).default)
            where = f"{code.name}, line {line.number}"
            sent = line.given.get("x", ""), operands.get(line.number, "")
            found.append(Collective(axis, f"{name} over {axis} of {words}", where, *sent))
    return tuple(found)


_LOCAL = ("send", "receive", "in_place")  # counts of rows, other on each rank; where a rank has its result


class Ranks:
    """The code and the events of all ranks of a program.

    ``changed``: the text of the code of single ranks (that of :attr:`autopar.codegen.python.RankProgram.code`, without
    a pipeline), in place of what is emitted for them.
    """

    def __init__(self, program: AnyProgram, changed: Mapping[int, str] | None = None) -> None:
        self.program, self.mesh = program, program.mesh
        self._known: dict[int, list[Event]] = {}
        self.changed = {rank: read_code(text) for rank, text in (changed or {}).items()}

    @cached_property
    def codes(self) -> tuple[Mapping[str, Code], ...]:
        """For each stage, its functions by name: the same on all of its ranks."""
        if isinstance(self.program, Program):
            return (_read(model_graphs(self.program).usual, self.program),)
        whole, found = self.program, []
        for stage in whole.stages:
            graphs = stage_graphs(stage, backward_steps(stage), whole.loss_in(stage))
            found.append(_read(graphs.usual, stage))
        return tuple(found)

    def all_codes(self) -> Iterator[Code]:
        """Every function of every rank, once for ranks that have the same."""
        for code in (*self.codes, *self.changed.values()):
            yield from code.values()

    def computed_otherwise(self) -> Iterator[str]:
        """In words: functions of a rank's changed code that compute something else than its graphs."""
        for rank, codes in self.changed.items():
            right = read_code(RankProgram(self.program, rank).code)  # with the numbers of this rank
            for name in dict.fromkeys((*right, *codes)):
                if name not in right or name not in codes:
                    yield f"rank {rank}: '{name}' is {'missing' if name in right else 'no function of the program'}"
                elif returned_of(right[name]) != returned_of(codes[name]):
                    yield f"rank {rank}: '{name}' was changed, and may compute something else: no layer runs its text"

    def of_rank(self, rank: int) -> list[Event]:
        """The events of a training step of ``rank``."""
        if rank in self.changed:
            return self._of_functions(self.changed[rank])
        return self.of_place(self.mesh.coordinates(rank).get(PIPELINE, 0))

    def of_place(self, place: int) -> list[Event]:
        """Those of all ranks of a place of the pipeline, whose code was not changed."""
        if place not in self._known:
            pipelined = isinstance(self.program, PipelinedProgram)
            self._known[place] = list(self._of_pipeline(place)) if pipelined else self._of_functions(self.codes[0])
        return self._known[place]

    def _of_functions(self, codes: Mapping[str, Code]) -> list[Event]:
        names = [name for name in (_function(Kind.F, codes), "backward") if name in codes]
        return [event for name in names for event in collectives_of(codes[name], self.mesh, bool(self.changed))]

    def _of_pipeline(self, place: int) -> Iterator[Event]:
        assert isinstance(self.program, PipelinedProgram)
        schedule = self.program.required_schedule
        flow = Flow(len(self.program.stages), links_of(self.program))
        known = {
            (stage, name): collectives_of(code, self.program.mesh.of_stage)
            for stage, codes in enumerate(self.codes)
            for name, code in codes.items()
        }
        for step in schedule.ranks[place]:
            if isinstance(step, Compute):
                for message in flow.needs(step):
                    if (source := schedule.placement[message.source]) != place:
                        yield Taking(message, source, str(step))
                yield from known.get((step.stage, _function(step.kind, self.codes[step.stage])), ())
            elif isinstance(step, Send):
                yield Sending(step.message, schedule.placement[step.message.target])
            else:
                yield Posting(step.message, schedule.placement[step.message.source])
        for stage, where in enumerate(schedule.placement):
            if where == place:
                yield from known.get((stage, REDUCE), ())


def _function(kind: Kind, codes: Mapping[str, Code]) -> str:
    if kind is Kind.F:
        return next(name for name in ("forward_for_loss", "forward") if name in codes)
    return FUNCTIONS[kind]


def _read(graphs: Mapping[str, fx.Graph], program: Program) -> Mapping[str, Code]:
    return read_code(emit(graphs, program))
