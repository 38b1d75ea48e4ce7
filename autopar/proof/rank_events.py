"""What each rank does that others wait for: collectives, messages between stages, in the order of its own code.

rank 0: all_reduce over tp (forward, line 31)   send F0.0 -> 1   post F1.0 -> 0 ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from autopar.codegen.python import RankProgram, emit
from autopar.ir import collectives as comm
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.mesh import PIPELINE, Mesh
from autopar.pipeline.links import links_of
from autopar.proof.rank_lines import Code, axis_of, read_code
from autopar.proof.rank_operands import operand_of, returned_of, walked
from autopar.proof.rank_texts import RankText, read_text, schedules_of, stage_functions, text_of
from autopar.runtime.rank_graphs import BACKWARD, FORWARD, INPUTS, LEARN, REDUCE, WEIGHTS, WHOLE, model_graphs
from autopar.schedules.instructions import Compute, Flow, Instruction, Kind, Message, Schedule, Send

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


def collectives_of(code: Code, mesh: Mesh, compared: bool = False, stage: int = 0) -> tuple[Collective, ...]:
    """The collectives of a function of a stage that any rank waits for: those over an axis of more than one rank.

    ``compared``: with the digests of their operands, which stages do not share.
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
            sent = line.given.get("x", ""), f"{stage}.{operands[line.number]}" if line.number in operands else ""
            found.append(Collective(axis, f"{name} over {axis} of {words}", where, *sent))
    return tuple(found)


_LOCAL = ("send", "receive", "in_place")  # counts of rows, other on each rank; where a rank has its result


def events_of(
    steps: Iterable[Instruction], flow: Flow, placement: Sequence[int], place: int
) -> Iterator[Sending | Posting | Taking | Compute]:
    """What a schedule's ``steps`` on the ranks at ``place`` of the pipeline wait for; each compute as it is."""
    for step in steps:
        if isinstance(step, Compute):
            for message in flow.needs(step):
                if (source := placement[message.source]) != place:
                    yield Taking(message, source, str(step))
            yield step
        elif isinstance(step, Send):
            yield Sending(step.message, placement[step.message.target])
        else:
            yield Posting(step.message, placement[step.message.source])


class Ranks:
    """The code and the events of all ranks of a program.

    ``changed``: for single ranks, what :func:`autopar.proof.rank_texts.text_of` gives, edited, in place of what is
    emitted for them.
    """

    def __init__(self, program: AnyProgram, changed: Mapping[int, str] | None = None) -> None:
        self.program, self.mesh = program, program.mesh
        self._known: dict[int, list[Event]] = {}
        self.changed = {rank: read_text(program, text, rank) for rank, text in (changed or {}).items()}

    @cached_property
    def codes(self) -> tuple[Mapping[str, Code], ...]:
        """For each stage, its functions by name: the same on all of its ranks."""
        if isinstance(self.program, Program):
            return (_read(model_graphs(self.program).usual, self.program),)
        whole = self.program
        return tuple(_read(stage_functions(whole, number), stage) for number, stage in enumerate(whole.stages))

    def all_codes(self) -> Iterator[Code]:
        """Every function of every rank, once for ranks that have the same."""
        for code in (*self.codes, *(code for text in self.changed.values() for code in text.codes.values())):
            yield from code.values()

    def schedules(self) -> Iterator[Schedule]:
        """Those by which ranks run, and for ranks whose steps were changed that of their line."""
        return schedules_of(self.program, self.changed)

    def computed_otherwise(self) -> Iterator[str]:
        """In words: functions of a rank's changed code that compute something else than its graphs."""
        for rank, text in self.changed.items():
            whole = read_text(self.program, text_of(self.program, rank), rank)  # with the numbers of this rank
            for stage, codes in text.codes.items():
                where, right = f" of stage {stage}" if self.mesh.is_pipelined else "", whole.codes[stage]
                for name in dict.fromkeys((*right, *codes)):
                    shown = f"rank {rank}: '{name}'{where}"
                    if name not in right or name not in codes:
                        yield f"{shown} is {'missing' if name in right else 'no function of the program'}"
                    elif returned_of(right[name]) != returned_of(codes[name]):
                        yield f"{shown} was changed, and may compute something else: no layer runs its text"

    def of_rank(self, rank: int) -> list[Event]:
        """The events of a training step of ``rank``."""
        place = self.mesh.coordinates(rank).get(PIPELINE, 0)
        if rank not in self.changed:
            return self.of_place(place)
        if isinstance(self.program, PipelinedProgram):
            return list(self._of_pipeline(place, self.changed[rank]))
        return self._of_functions(self.changed[rank].codes[0])

    def of_place(self, place: int) -> list[Event]:
        """Those of all ranks of a place of the pipeline, whose code was not changed."""
        if place not in self._known:
            pipelined = isinstance(self.program, PipelinedProgram)
            self._known[place] = list(self._of_pipeline(place) if pipelined else self._of_functions(self._as_text))
        return self._known[place]

    @cached_property
    def _as_text(self) -> Mapping[str, Code]:
        """The functions of a model, which take parameters as they are kept where the texts of ranks do too."""
        assert isinstance(self.program, Program)
        return _read(RankProgram(self.program, 0).graphs, self.program) if self.changed else self.codes[0]

    def _of_functions(self, codes: Mapping[str, Code]) -> list[Event]:
        names = [name for name in (_function(Kind.F, codes), BACKWARD) if name in codes]
        return [event for name in names for event in collectives_of(codes[name], self.mesh, bool(self.changed))]

    def _of_pipeline(self, place: int, changed: RankText | None = None) -> Iterator[Event]:
        assert isinstance(self.program, PipelinedProgram)
        schedule = self.program.required_schedule
        own = changed.codes if changed is not None else {}
        mine = [stage for stage, where in enumerate(schedule.placement) if where == place]
        codes = {stage: own.get(stage, self.codes[stage]) for stage in mine}
        mesh = self.program.mesh.of_stage
        known = {
            (stage, name): collectives_of(code, mesh, bool(self.changed), stage)
            for stage, functions in codes.items()
            for name, code in functions.items()
        }
        steps = changed.steps if changed is not None and changed.steps is not None else schedule.ranks[place]
        flow = Flow(len(self.program.stages), links_of(self.program))
        for event in events_of(steps, flow, schedule.placement, place):
            if isinstance(event, Compute):
                yield from known.get((event.stage, _function(event.kind, self.codes[event.stage])), ())
            else:
                yield event
        for stage in mine:
            yield from known.get((stage, REDUCE), ())


def _function(kind: Kind, codes: Mapping[str, Code]) -> str:
    """The function of ``codes`` that a compute of a schedule runs."""
    return FUNCTIONS[kind] if kind is not Kind.F else LEARN if LEARN in codes else FORWARD


def _read(graphs: Mapping[str, fx.Graph], program: Program) -> Mapping[str, Code]:
    return read_code(emit(graphs, program))
