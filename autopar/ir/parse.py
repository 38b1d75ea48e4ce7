"""The reader of the text form: ``parse(str(program))`` is a program that prints the same.

Nothing in the text is executed: operators are looked up among the registered ones, everything else is data. Comments
(``# ...``), blank lines and the alignment of columns mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autopar.errors import ProgramFileError, ScheduleError
from autopar.ir import text
from autopar.ir.collection import no_collection
from autopar.ir.cursor import MOST_RANKS, Cursor
from autopar.ir.node import values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.read_graph import SAVED, GraphReader, Section
from autopar.ir.tables import InputKind, Output, OutputKind, Role
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.schedules.instructions import Schedule
from autopar.schedules.text import parse_schedule

HEADER = re.compile(r"program mesh\(([^()]*)\)( nograd)?\s*(#.*)?")
RETURN = re.compile(r"\s*return\b")  # continues in the next line if it ends in a comma
SECTION = re.compile(r"(forward|backward|inference):\s*(#.*)?")
PART = re.compile(r"(counts|stage|schedule|tail|remainder)\b")  # begins a section of a pipelined program
STAGE = re.compile(r"stage \d+ of \d+")
COUNTS = "counts"
TAILS = ("tail", "remainder")  # the name of the program of smaller last microbatches, now and in older files

Lines = list[tuple[int, str]]
Reading = Callable[..., GraphReader]  # a reader for a mesh, with all that is the same for every section


@no_collection()  # of a long text it would take most of the time
def parse(
    source: str,
    plan: Plan | None = None,
    constants: Mapping[str, Tensor] | None = None,
    *,
    origins: bool = False,
    operators: Collection[str] = (),
) -> AnyProgram:
    """The program that ``source`` (a text form) describes.

    ``plan``: not in the text; the default plan unless given. ``constants``: values by name, zeros for those not given.
    ``origins``: take the comment at the end of a line for its origin, as ``format_program(origins=True)`` wrote it.
    ``operators``: further libraries, or operators of theirs, that the text may call (``mylib``, ``mylib::scale``).
    Raises ProgramFileError with the line number and what was expected there.
    """
    given = dict(constants or {})
    (_, whole), *others = _programs(source)
    reading = partial(GraphReader, origins=origins, operators=operators)
    program = _program(whole, plan, given, reading)
    if others and others[0][0] == COUNTS:
        _, lines = others.pop(0)
        lines[0] = lines[0][0], lines[0][1].replace(COUNTS, "program", 1)
        program = replace(program, counts=_program(lines, plan, given, reading))
    if not others:
        return program
    stages: list[Program] = []
    schedule: Schedule | None = None
    tail: PipelinedProgram | None = None
    for position, (kind, lines) in enumerate(others):
        if kind in TAILS:
            last = {name.removeprefix(f"{kind}/"): tensor for name, tensor in given.items() if is_of_tail(name)}
            again = next((chunk[0][0] for other, chunk in others[position + 1 :] if other in TAILS), None)
            if again is not None:
                raise ProgramFileError(f"line {again}: a second {kind}; expected a stage or a schedule")
            rest = _padded([line for _, chunk in others[position:] for line in chunk])
            found = parse(rest.replace(kind, "program", 1), plan, last, origins=origins, operators=operators)
            if not isinstance(found, PipelinedProgram):
                raise ProgramFileError(f"line {lines[0][0]}: expected stages of the {kind}")
            tail = found
            break
        if kind == "schedule":
            schedule = _schedule(lines)
        else:
            number, heading = lines[0]
            lines[0] = number, STAGE.sub("program", heading)
            stages.append(_program(lines, plan, given, reading))
    return replace(program.cut_into(stages), schedule=schedule, tail=tail)


def is_of_tail(name: str) -> bool:
    """Whether a constant belongs to the tail: its name then begins with the heading of the tail."""
    return name.startswith(tuple(f"{word}/" for word in TAILS))


def _programs(source: str) -> list[tuple[str, Lines]]:
    """The sections of a pipelined program: its own graph, stages, schedule, tail, with their numbered lines."""
    parts: list[tuple[str, Lines]] = [("program", [])]
    for number, line in enumerate(source.splitlines(), 1):
        found = PART.match(line)
        if found:
            parts.append((found[1], []))
        parts[-1][1].append((number, line))
    return parts


def _padded(lines: Lines) -> str:
    """Text in which the lines have their numbers."""
    return "\n" * (lines[0][0] - 1) + "\n".join(line for _, line in lines)


def _schedule(lines: Lines) -> Schedule:
    try:
        return parse_schedule(_padded(lines))
    except ScheduleError as error:
        raise ProgramFileError(str(error)) from error


def _program(lines: Lines, plan: Plan | None, constants: Mapping[str, Tensor], reading: Reading) -> Program:
    sections = list(_sections(lines))
    number, header, body = sections[0]
    mesh, gradients = _header(number, header)
    main = reading(mesh, gradients=gradients, role=False).read(number, body)
    outputs = tuple(Output(kind, target) for kind, target in main.labels if isinstance(kind, OutputKind))
    program = Program(
        graph=main.graph,
        mesh=mesh,
        plan=plan or Plan(),
        inputs=tuple(main.inputs),
        outputs=outputs,
        constants=_constants(main, constants),
    )
    return replace(program, role=_role(sections[1:], program, reading))


# ---------------------------------------------------------------- sections


def _sections(lines: Lines) -> Iterator[tuple[int, str, Lines]]:
    """(line number, heading, [(line number, line)]) for the header and each ``forward:``, ... after it."""
    heading, body, unfinished = (0, ""), Lines(), list[str]()
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace() and (not heading[0] or SECTION.fullmatch(line)):
            if heading[0]:
                yield (*heading, body)
            heading, body, unfinished = (number, line), [], []
        elif heading[0]:
            goes_on = (bool(unfinished) or RETURN.match(line) is not None) and line.rstrip().endswith(",")
            unfinished.append(line.strip() if unfinished else line)
            if len(unfinished) == 1:
                body.append((number, line))
            elif not goes_on:
                body[-1] = body[-1][0], " ".join(unfinished)
            unfinished = unfinished if goes_on else []
        else:
            break
    if not heading[0]:
        raise ProgramFileError("line 1: expected the header of a program, e.g. 'program mesh(dp=2 tp=2)'")
    yield (*heading, body)


def _header(number: int, line: str) -> tuple[Mesh, bool]:
    found = HEADER.fullmatch(line)
    if not found:
        raise ProgramFileError(
            f"line {number}: expected a header like 'program mesh(dp=2 tp=2)', found '{line}'\n"
            "Way out: a text as print(program) and autopar show --full give it."
        )
    try:
        mesh = Mesh.parse(found[1])
    except ValueError as error:
        raise ProgramFileError(f"line {number}: {error}") from error
    if mesh.world_size > MOST_RANKS:
        raise ProgramFileError(f"line {number}: a mesh of {mesh.world_size:,} ranks; at most {MOST_RANKS:,} are read")
    return mesh, not found[2]


def _role(sections: Sequence[tuple[int, str, Lines]], program: Program, reading: Reading) -> Role | None:
    """A ``forward:`` section, possibly a ``backward:`` section, and an ``inference:`` section; or none of them."""
    rest = [(number, heading.partition(":")[0], body) for number, heading, body in sections]
    if not rest:
        return None

    def take(name: str) -> Section:
        if not rest or rest[0][1] != name:
            found = f"line {rest[0][0]}: found '{rest[0][1]}:', " if rest else "at the end: "
            raise ProgramFileError(f"{found}expected a section '{name}:'")
        number, _, body = rest.pop(0)
        return reading(program.mesh, gradients=False, role=True).read(number, body)

    forward = take("forward")
    backward = take("backward") if rest and rest[0][1] == "backward" else None
    inference = take("inference")
    if rest:
        raise ProgramFileError(f"line {rest[0][0]}: found '{rest[0][1]}:' behind 'inference:', which is the last")
    return Role(
        forward=forward.graph,
        backward=backward.graph if backward else None,
        inference=inference.graph,
        saved=sum(kind == SAVED for kind, _ in forward.labels),
        differentiable=_differentiable(program, backward.gradients) if backward else (),
        grads=tuple(target for _, target in backward.labels) if backward else (),
    )


def _differentiable(program: Program, gradients: Sequence[tuple[Cursor, str]]) -> tuple[int, ...]:
    names = {name: position for position, name in enumerate(text.grad_names(program.outputs))}
    for cursor, name in gradients:
        if name not in names:
            cursor.fail(f"the name of an output ({', '.join(names)})", found=name)
    return tuple(names[name] for _, name in gradients)


def _constants(main: Section, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given constants; zeros for the rest."""
    found = {}
    for entry in main.inputs:
        if entry.kind is not InputKind.CONSTANT:
            continue
        if entry.target in given:
            found[entry.target] = given[entry.target]
            continue
        for value in values(main.nodes[entry.node]):
            found[entry.target] = torch.zeros((), dtype=value.dtype).expand(value.shape)  # of any size, without memory
    return found
