"""The reader of the text form: ``parse(str(program))`` is a program that prints the same.

Nothing in the text is executed: operators are looked up among the registered ones, everything else is data. Comments
(``# ...``), blank lines and the alignment of columns mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autopar.errors import ProgramFileError, ScheduleError
from autopar.ir import text
from autopar.ir.cursor import Cursor
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
PART = re.compile(r"(stage|schedule|tail|remainder)\b")  # begins a section of a pipelined program
STAGE = re.compile(r"stage \d+ of \d+")
TAILS = ("tail", "remainder")  # the name of the program of smaller last microbatches, now and in older files

Lines = list[tuple[int, str]]


def parse(
    source: str, plan: Plan | None = None, constants: Mapping[str, Tensor] | None = None, *, origins: bool = False
) -> AnyProgram:
    """The program that ``source`` (a text form) describes.

    ``plan``: not in the text; the default plan unless given. ``constants``: values by name, zeros for those not given.
    ``origins``: take the comment at the end of a line for its origin, as ``format_program(origins=True)`` wrote it.
    Raises ProgramFileError with the line number and what was expected there.
    """
    given = dict(constants or {})
    (_, whole), *others = _programs(source)
    program = _program(whole, plan, given, origins)
    if not others:
        return program
    stages: list[Program] = []
    schedule: Schedule | None = None
    tail: PipelinedProgram | None = None
    for position, (kind, lines) in enumerate(others):
        if kind in TAILS:
            last = {name.removeprefix(f"{kind}/"): tensor for name, tensor in given.items() if is_of_tail(name)}
            rest = _padded([line for _, chunk in others[position:] for line in chunk])
            found = parse(rest.replace(kind, "program", 1), plan, last, origins=origins)
            if not isinstance(found, PipelinedProgram):
                raise ProgramFileError(f"line {lines[0][0]}: expected stages of the {kind}")
            tail = found
            break
        if kind == "schedule":
            schedule = _schedule(lines)
        else:
            number, heading = lines[0]
            lines[0] = number, STAGE.sub("program", heading)
            stages.append(_program(lines, plan, given, origins))
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


def _program(lines: Lines, plan: Plan | None, constants: Mapping[str, Tensor], origins: bool) -> Program:
    sections = list(_sections(lines))
    number, header, body = sections[0]
    mesh, gradients = _header(number, header)
    main = GraphReader(mesh, gradients=gradients, role=False, origins=origins).read(number, body)
    outputs = tuple(Output(kind, target) for kind, target in main.labels if isinstance(kind, OutputKind))
    program = Program(
        graph=main.graph,
        mesh=mesh,
        plan=plan or Plan(),
        inputs=tuple(main.inputs),
        outputs=outputs,
        constants=_constants(main, constants),
    )
    return replace(program, role=_role(sections[1:], program, origins))


# ---------------------------------------------------------------- sections


def _sections(lines: Lines) -> Iterator[tuple[int, str, Lines]]:
    """(line number, heading, [(line number, line)]) for the header and each ``forward:``, ... after it."""
    heading, body, unfinished = (0, ""), Lines(), False
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace() and (not heading[0] or SECTION.fullmatch(line)):
            if heading[0]:
                yield (*heading, body)
            heading, body, unfinished = (number, line), [], False
        elif heading[0]:
            goes_on = (unfinished or RETURN.match(line) is not None) and line.rstrip().endswith(",")
            body.append((body[-1][0], f"{body.pop()[1]} {line.strip()}") if unfinished else (number, line))
            unfinished = goes_on
        else:
            break
    if not heading[0]:
        raise ProgramFileError("line 1: expected the header of a program, e.g. 'program mesh(dp=2 tp=2)'")
    yield (*heading, body)


def _header(number: int, line: str) -> tuple[Mesh, bool]:
    found = HEADER.fullmatch(line)
    if not found:
        raise ProgramFileError(f"line {number}: expected a header like 'program mesh(dp=2 tp=2)', found '{line}'")
    try:
        return Mesh.parse(found[1]), not found[2]
    except ValueError as error:
        raise ProgramFileError(f"line {number}: {error}") from error


def _role(sections: Sequence[tuple[int, str, Lines]], program: Program, origins: bool) -> Role | None:
    """A ``forward:`` section, possibly a ``backward:`` section, and an ``inference:`` section; or none of them."""
    rest = [(number, heading.partition(":")[0], body) for number, heading, body in sections]
    if not rest:
        return None

    def take(name: str) -> Section:
        if not rest or rest[0][1] != name:
            found = f"line {rest[0][0]}: found '{rest[0][1]}:', " if rest else "at the end: "
            raise ProgramFileError(f"{found}expected a section '{name}:'")
        number, _, body = rest.pop(0)
        return GraphReader(program.mesh, gradients=False, role=True, origins=origins).read(number, body)

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
    names = [text.grad_name(program.outputs, position) for position in range(len(program.outputs))]
    for cursor, name in gradients:
        if name not in names:
            cursor.fail(f"the name of an output ({', '.join(names)})", found=name)
    return tuple(names.index(name) for _, name in gradients)


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
            found[entry.target] = torch.zeros(value.shape, dtype=value.dtype)
    return found
