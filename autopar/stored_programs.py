"""``parallelize(..., program=)``: a program that was compiled before, compared with model, mesh and plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from torch import nn

from autopar.cache.read_programs import read_program
from autopar.errors import ProgramFileError
from autopar.families.family import Family
from autopar.frontend.fingerprint import of_model
from autopar.ir.fingerprint import differences
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.program_files.family_file import holds_family, load_family
from autopar.runtime.written_code import written

OneProgram = str | Path | AnyProgram | Family
AT_RUN_TIME = ("seed", "initial", "timeout", "check_numerics")  # choices that no program depends on
SHOWN, WIDTH = 6, 150


@dataclass(frozen=True)
class Stored:
    """A program, and the words for where it is from. Of a ``family`` it is the first one."""

    program: AnyProgram
    where: str
    family: Family | None = None

    @classmethod
    def of(cls, given: OneProgram) -> Stored:
        """Raises ProgramFileError for a directory that holds none."""
        if isinstance(given, (str, Path)) and holds_family(given):
            family = load_family(given)
            return cls(family.first_program, f"the family in {given}", family)
        if isinstance(given, Family):
            return cls(given.first_program, "the family", given)
        if isinstance(given, (str, Path)):
            return cls(read_program(given, written), f"the program in {given}")
        return cls(given, "the program")

    def check_fits(self, model: nn.Module, mesh: Mesh, plan: Plan) -> None:
        """Raise ProgramFileError, which names what differs, unless it was compiled from this model for these."""
        check_fits(self, model, mesh, plan)


def stored_programs(given: OneProgram | Sequence[OneProgram]) -> list[Stored]:
    """One or several programs of one model: of training and evaluation, or of other shapes. Raises ProgramFileError."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = [Stored.of(one) for one in (cast(Sequence[OneProgram], given) if several else [cast(OneProgram, given)])]
    if not found:
        raise ValueError("program=[]: give a directory, a program, or several of them")
    return found


def check_fits(stored: Stored, model: nn.Module, mesh: Mesh, plan: Plan) -> None:
    """Raise ProgramFileError, which names what differs, unless ``stored`` was compiled from this model for these."""
    program = stored.program
    if program.fingerprint is None:
        raise ProgramFileError(
            f"{stored.where} does not say from which model it was compiled\n"
            "Way out: save what autopar.compile_program(model, ...) gives, or use autopar compile."
        )
    problems = [*_of_mesh_and_plan(program, mesh, plan), *_of_model(program, model)]
    if problems:
        shown = "\n".join(f"  {line if len(line) <= WIDTH else line[:WIDTH] + ' ...'}" for line in problems[:SHOWN])
        shown += f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ProgramFileError(
            f"{stored.where} is not that of this model, mesh and plan:\n{shown}\n"
            "Way out: compile it again (autopar compile, or program.save), or leave program= out, which compiles now."
        )


def _of_mesh_and_plan(program: AnyProgram, mesh: Mesh, plan: Plan) -> Iterator[str]:
    if mesh != program.mesh:
        yield f"mesh: {program.mesh} in the program, {mesh} here"
    for entry in fields(Plan):
        before, now = getattr(program.plan, entry.name), getattr(plan, entry.name)
        if before != now and entry.name not in AT_RUN_TIME:
            yield f"plan: {entry.name}={before!r} in the program, {now!r} here"


def _of_model(program: AnyProgram, model: nn.Module) -> Iterator[str]:
    known = program.fingerprint
    assert known is not None
    here = of_model(model, known.call)
    for what, before, now in (
        ("", known.code, here.code),
        ("", known.tensors, here.tensors),
        ("module ", known.modules, here.modules),
    ):
        for name, then, there in differences(before, now):
            yield f"{what}{name}: {then} in the program, {there} here"
