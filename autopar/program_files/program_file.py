"""Programs on disk: ``save`` writes a directory, ``load`` reads it, without running anything that is in it.

manifest.json          format version, torch version, mesh, plan, ranks, tables of inputs, outputs and parameters
program.txt            the graphs, in the text form
constants.safetensors  tensors that the model made itself (masks, tables, buffers that no state dict has); parameters
                       are not part of a program
source.txt             the model as it was traced, see :mod:`autopar.program_files.source_files`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError, ProgramFileError
from autopar.ir.fingerprint import Fingerprint
from autopar.ir.loadable_operators import EVERY
from autopar.ir.parse import TAILS, parse
from autopar.ir.program import AnyProgram, PipelinedProgram, format_program
from autopar.ir.read_graph import parse_argument
from autopar.notes import warn
from autopar.plan import Plan
from autopar.program_files.checks import check_loaded
from autopar.program_files.directory import (
    CONSTANTS,
    MANIFEST,
    MOST_BYTES,
    TEXT,
    checked_names,
    checksum,
    entry,
    laid_out,
    read_manifest,
    refuse_strangers,
    verified,
    write,
)
from autopar.program_files.manifest import describe
from autopar.program_files.source_files import (
    is_marked,
    source_constants,
    source_files,
    sources,
    with_sources,
    without_sources,
)
from autopar.program_files.structures import structure_from_json

BUFFER = "buffer/"  # begins the name of a made buffer among the constants
# Reading a damaged file may end in any of these; torch raises RuntimeError, and RecursionError is one.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
DAMAGE = (AutoparError, safetensors.SafetensorError, *FAULTS)

# ---------------------------------------------------------------- writing


def save(
    program: AnyProgram,
    directory: str | Path,
    *,
    extra_files: Mapping[str, str] | None = None,
    more: Callable[[AnyProgram], Mapping[str, bytes]] | None = None,
) -> Path:
    """Write ``program`` to ``directory``, all of it or nothing; an existing program is replaced.

    ``extra_files``: relative path -> content of files to be read by people, e.g. generated Python; ``load`` ignores
    them. Not kept: ``program.decisions``; nor, with a warning, a source that has no text form. Raises ProgramFileError,
    with nothing written, if the program cannot be written down or ``directory`` holds other things.

    ``more``: further files of a known name, made of the program as it will be read back.
    """
    target = Path(os.path.realpath(directory))
    extra = checked_names(extra_files or {})
    refuse_strangers(target)
    program, texts = _with_readable_sources(program)
    contents = {TEXT: _text(program).encode(), CONSTANTS: _constants(program), **texts}
    try:
        manifest = describe(program)
    except ValueError as error:
        raise ProgramFileError(f"the program cannot be saved: {error}") from error
    for key in ("static_inputs", "static_outputs"):
        _readable_statics(key, manifest[key])
    manifest["files"] = {name: entry(content) for name, content in contents.items()}
    if more is not None:
        contents |= more(_program(manifest, contents, EVERY))
        manifest["files"] = {name: entry(content) for name, content in contents.items()}
    manifest["extra_files"] = sorted(extra)
    manifest["sha256"] = checksum(manifest)
    contents[MANIFEST] = laid_out(manifest).encode()
    _refuse_large(contents)
    write({name: content.encode() for name, content in extra.items()} | contents, target)
    return Path(directory)


def _with_readable_sources(program: AnyProgram) -> tuple[AnyProgram, dict[str, bytes]]:
    """``program`` and the files of its sources; without those that would not load wherever ``program`` does."""
    used = {node.target for part in program.parts for graph in part.graphs.values() for node in graph.nodes}
    operators = {target._schema.name for target in used if isinstance(target, torch._ops.OpOverload)}
    try:
        return program, {name: _text(source, operators).encode() for name, source in sources(program)}
    except ProgramFileError as error:
        warn(f"its source is left out: {error}", stacklevel=4)
        return without_sources(program), {}


def _text(program: AnyProgram, operators: Collection[str] = EVERY) -> str:
    """The text form, after a check that it reads back, where the reader trusts ``operators``."""
    source = format_program(program, origins=True)
    try:
        read = parse(source, program.plan, _all_constants(program), origins=True, operators=operators)
        again = format_program(read, origins=True)
    except ProgramFileError as error:
        raise ProgramFileError(f"the program cannot be saved, its text form does not read back: {error}") from error
    for line, (written, back) in enumerate(zip(source.splitlines(), again.splitlines()), 1):
        if written != back:
            raise ProgramFileError(
                f"the program cannot be saved: line {line} reads back differently\n{written}\n{back}"
            )
    return source + "\n"


def _refuse_large(contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        if len(content) > MOST_BYTES[name]:
            raise ProgramFileError(
                f"the program cannot be saved: {name} would have {len(content):,} bytes, and at most "
                f"{MOST_BYTES[name]:,} are read"
            )


def _all_constants(program: AnyProgram) -> dict[str, Tensor]:
    """The constants, with those of source and tail under marked names: they may have other sizes."""
    tail = program.tail if isinstance(program, PipelinedProgram) else None
    rest = _all_constants(tail) if tail is not None else {}
    counted = program.counts.constants if program.counts is not None else {}
    of_tail = {f"{TAILS[0]}/{name}": tensor for name, tensor in rest.items()}
    return {**counted, **program.constants, **source_constants(program), **of_tail}


def _constants(program: AnyProgram) -> bytes:
    buffers = {BUFFER + name: tensor for name, tensor in program.made_buffers.items()}
    constants = {**_all_constants(program), **buffers}
    for name, tensor in constants.items():
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            raise ProgramFileError(
                f"the program cannot be saved: constant '{name}' has no data ({tensor.device} tensor); "
                "trace the model with this constant on a real device"
            )
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in constants.items()}
    return bytes(safetensors.torch.save(copies))


def _readable_statics(key: str, table: Iterable[tuple[int, str]]) -> None:
    for position, argument in table:
        try:
            parse_argument(argument)
        except ProgramFileError as error:
            problem = f"{key}: {argument} at position {position} has no text form"
            raise ProgramFileError(f"the program cannot be saved: {problem}") from error


# ---------------------------------------------------------------- reading


def load(directory: str | Path, *, operators: Collection[str] = ()) -> AnyProgram:
    """The program that :func:`save` wrote to ``directory``. Nothing in ``directory`` is run or imported.

    Its operators are those of torch and autopar that only compute, and those that the caller trusts: ``operators`` has
    namespaces (``mylib``) or operators (``mylib::scale``), which are registered in this process. Unknown output classes
    become dicts or tuples, with a warning. Raises ProgramFileError if files are missing, damaged, no ordinary files of
    this directory, of another format version, say sizes that no program has, or name operators that are not allowed.
    """
    directory = Path(directory)
    return parsed(directory, *contents_of(directory), operators)


def contents_of(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and the files that it describes, as they are there. Raises ProgramFileError."""
    manifest = read_manifest(directory)
    return manifest, {name: verified(directory, name, manifest) for name in (TEXT, CONSTANTS, *source_files(manifest))}


def parsed(
    directory: Path, manifest: Mapping[str, Any], contents: Mapping[str, bytes], operators: Collection[str] = ()
) -> AnyProgram:
    """The program in :func:`contents_of` ``directory``. Raises ProgramFileError, as :func:`load` does."""
    try:
        return _program(manifest, contents, operators)
    except DAMAGE as error:
        reason = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
        raise ProgramFileError(
            f"the program in {directory} cannot be read: {reason:.1000}\n"
            f"It was written with torch {str(manifest.get('torch')):.40}, this is torch {torch.__version__}; "
            "import the libraries that define its operators, or save the program again with this version"
        ) from error


def _program(manifest: Mapping[str, Any], contents: Mapping[str, bytes], operators: Collection[str]) -> AnyProgram:
    """Raises any of ``DAMAGE``."""
    plan = Plan.from_json(manifest["plan"])
    structures = {key: _structure(key, manifest["structures"][key]) for key in ("inputs", "outputs")}
    static = {key: _statics(manifest[key]) for key in ("static_inputs", "static_outputs")}
    passes, known = tuple(map(str, manifest["passes"])), manifest.get("fingerprint")
    tensors = safetensors.torch.load(contents[CONSTANTS])
    constants = {name: tensor for name, tensor in tensors.items() if not name.startswith(BUFFER)}
    buffers = {name.removeprefix(BUFFER): tensor for name, tensor in tensors.items() if name.startswith(BUFFER)}
    read = partial(parse, origins=True, operators=operators)
    program = read(contents[TEXT].decode(), plan, constants)
    program = replace(
        program,
        in_spec=structures["inputs"],
        out_spec=structures["outputs"],
        passes=passes,
        made_buffers=buffers,
        fingerprint=None if known is None else Fingerprint.from_json(known),
        constants={name: tensor for name, tensor in constants.items() if not is_marked(name)},
        static_inputs=static["static_inputs"],
        static_outputs=static["static_outputs"],
        joins={str(name): str(join) for name, join in manifest.get("joins", {}).items()},
    )
    check_loaded(program, constants)
    texts = {name: contents[name].decode() for name in source_files(manifest)}
    return with_sources(program, texts, constants, lambda text, known: read(text, plan, known))


def _structure(key: str, data: Any) -> pytree.TreeSpec | None:
    spec, unknown = structure_from_json(data)
    if unknown:
        warn(
            f"the program's {key} use {', '.join(sorted(set(unknown)))}, which is not known here: "
            "plain dicts and tuples stand in (import the classes before loading to get them back)",
            stacklevel=5,
        )
    return spec


def _statics(table: Any) -> tuple[tuple[int, Any], ...]:
    return tuple((int(position), parse_argument(argument)) for position, argument in table)
