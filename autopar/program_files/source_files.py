"""The sources of a program on disk: the graphs that it was made from, each in a file of its own.

``source.txt`` is the text form of the model as it was traced; ``source_of_tail.txt`` that of the last microbatches,
where these have fewer rows. Their constants are among those of the program, under names that begin with ``source/``,
except the ones that the program has itself. A program that keeps no source has neither file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from autopar.errors import ProgramFileError
from autopar.ir.parse import TAILS, is_of_tail
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.program_files.checks import check_source
from autopar.program_files.directory import SOURCE, SOURCE_OF_TAIL

PREFIX = "source/"  # begins the name of a constant of a source
OF_TAIL = f"{TAILS[0]}/"

# ---------------------------------------------------------------- writing


def sources(program: AnyProgram) -> Iterator[tuple[str, Program]]:
    """The file of each source that ``program`` keeps, and the source."""
    tail = program.tail if isinstance(program, PipelinedProgram) else None
    for name, part in ((SOURCE, program), (SOURCE_OF_TAIL, tail)):
        if part is not None and part.source is not None:
            yield name, part.source


def source_constants(program: AnyProgram) -> dict[str, Tensor]:
    """By name, those constants of the source of ``program``, not of its tail, that are not the program's own."""
    if program.source is None:
        return {}
    own = program.constants
    return {PREFIX + name: tensor for name, tensor in program.source.constants.items() if own.get(name) is not tensor}


def without_sources(program: AnyProgram) -> AnyProgram:
    """``program`` without what it was made from."""
    program = replace(program, source=None)
    if isinstance(program, PipelinedProgram) and program.tail is not None:
        program = replace(program, tail=replace(program.tail, source=None))
    return program


def is_marked(name: str) -> bool:
    """Whether a constant is one of a source or of the tail, not of the program itself."""
    return name.startswith(PREFIX) or is_of_tail(name)


# ---------------------------------------------------------------- reading


def source_files(manifest: Mapping[str, Any]) -> list[str]:
    """The files of sources that a manifest names."""
    files = manifest.get("files")
    return [name for name in (SOURCE, SOURCE_OF_TAIL) if isinstance(files, dict) and name in files]


def with_sources(
    program: AnyProgram, texts: Mapping[str, str], constants: Mapping[str, Tensor], read: Callable[..., AnyProgram]
) -> AnyProgram:
    """``program`` with the sources in ``texts``, by file; ``read(text, constants)`` is the program of a text.

    Raises ProgramFileError for a text that is no source of this program, and what ``read`` raises.
    """
    if SOURCE in texts:
        program = replace(program, source=_source(program, SOURCE, texts, constants, read))
    if SOURCE_OF_TAIL not in texts:
        return program
    tail = program.tail if isinstance(program, PipelinedProgram) else None
    if tail is None:
        raise ProgramFileError(f"there is {SOURCE_OF_TAIL}, and the program has no tail")
    assert isinstance(program, PipelinedProgram)
    own = {name.removeprefix(OF_TAIL): x for name, x in constants.items() if name.startswith(OF_TAIL)}
    described = replace(tail, **{name: getattr(program, name) for name in ("in_spec", "out_spec", "static_inputs")})
    described = replace(described, static_outputs=program.static_outputs)
    return replace(program, tail=replace(tail, source=_source(described, SOURCE_OF_TAIL, texts, own, read)))


def _source(
    program: AnyProgram,
    file: str,
    texts: Mapping[str, str],
    constants: Mapping[str, Tensor],
    read: Callable[..., AnyProgram],
) -> Program:
    own = {name.removeprefix(PREFIX): tensor for name, tensor in constants.items() if name.startswith(PREFIX)}
    try:
        source = read(texts[file], {**program.constants, **own})
        check_source(source, program)
    except ProgramFileError as error:
        raise ProgramFileError(f"{file}: {error}") from error
    assert isinstance(source, Program)
    return replace(
        source,
        in_spec=program.in_spec,
        out_spec=program.out_spec,
        static_inputs=program.static_inputs,
        static_outputs=program.static_outputs,
        passes=program.passes[:1],
    )
