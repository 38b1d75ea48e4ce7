"""Programs on disk: ``save`` writes a directory, ``load`` reads it, without running anything that is in it.

manifest.json          format version, torch version, mesh, plan, ranks, tables of inputs, outputs and parameters
program.txt            the graphs, in the text form
constants.safetensors  tensors that the model made itself (masks, tables); parameters are not part of a program
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from autopar.errors import ProgramFileError
from autopar.ir.node import value
from autopar.ir.parse import TAILS, is_of_tail, parse
from autopar.ir.program import AnyProgram, PipelinedProgram, format_program
from autopar.ir.read_graph import parse_argument
from autopar.ir.tables import InputKind
from autopar.plan import Plan
from autopar.program_files.manifest import FORMAT, VERSION, describe
from autopar.program_files.structures import structure_from_json

MANIFEST, TEXT, CONSTANTS = "manifest.json", "program.txt", "constants.safetensors"

# ---------------------------------------------------------------- writing


def save(program: AnyProgram, directory: str | Path, *, extra_files: Mapping[str, str] | None = None) -> Path:
    """Write ``program`` to ``directory``, all of it or nothing; an existing program is replaced.

    ``extra_files``: relative path -> content of files to be read by people, e.g. generated Python; ``load`` ignores
    them. Not kept: ``program.decisions``. Raises ProgramFileError, with nothing written, if the program cannot be
    written down or ``directory`` holds other things.
    """
    target = Path(directory).absolute()
    extra = _checked_names(extra_files or {})
    _refuse_strangers(target)
    contents = {TEXT: _text(program).encode(), CONSTANTS: _constants(program)}
    try:
        manifest = describe(program)
    except ValueError as error:
        raise ProgramFileError(f"the program cannot be saved: {error}") from error
    for key in ("static_inputs", "static_outputs"):
        _readable_statics(key, manifest[key])
    manifest["files"] = {name: _entry(content) for name, content in contents.items()}
    manifest["extra_files"] = sorted(extra)
    manifest["sha256"] = _checksum(manifest)
    contents |= {name: content.encode() for name, content in extra.items()}
    _write({**contents, MANIFEST: _laid_out(manifest).encode()}, target)
    return Path(directory)


def _text(program: AnyProgram) -> str:
    """The text form, after a check that it reads back."""
    source = format_program(program, origins=True)
    try:
        again = format_program(parse(source, program.plan, _all_constants(program), origins=True), origins=True)
    except ProgramFileError as error:
        raise ProgramFileError(f"the program cannot be saved, its text form does not read back: {error}") from error
    for line, (written, read) in enumerate(zip(source.splitlines(), again.splitlines()), 1):
        if written != read:
            raise ProgramFileError(
                f"the program cannot be saved: line {line} reads back differently\n{written}\n{read}"
            )
    return source + "\n"


def _all_constants(program: AnyProgram) -> dict[str, Tensor]:
    """The constants, with those of the tail under marked names: they may have other sizes."""
    tail = program.tail if isinstance(program, PipelinedProgram) else None
    rest = _all_constants(tail) if tail is not None else {}
    return {**program.constants, **{f"{TAILS[0]}/{name}": tensor for name, tensor in rest.items()}}


def _constants(program: AnyProgram) -> bytes:
    constants = _all_constants(program)
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


def _checked_names(files: Mapping[str, str]) -> dict[str, str]:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise ProgramFileError(f"extra file '{name}': a relative path without '..' is needed")
        if str(path) in (MANIFEST, TEXT, CONSTANTS):
            raise ProgramFileError(f"extra file '{name}' has the name of a file of the program itself")
    return {str(PurePosixPath(name)): content for name, content in files.items()}


def _refuse_strangers(target: Path) -> None:
    """Raise ProgramFileError unless ``target`` is missing, empty, or holds a program and nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ProgramFileError(f"{target} is a file; give the name of a directory")
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    try:
        ours = {MANIFEST, TEXT, CONSTANTS, *_manifest(target)["extra_files"]} if present else set()
    except ProgramFileError as error:
        raise ProgramFileError(f"{target} is not empty and holds no program; save into another directory") from error
    strangers = sorted(present - ours)
    if strangers:
        raise ProgramFileError(
            f"{target} holds files that are not of the program there: {', '.join(strangers[:5])}; "
            "move them away, or save into another directory"
        )


def _write(contents: Mapping[str, bytes], target: Path) -> None:
    """Write everything to a directory beside ``target``, which then takes its place."""
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    old = draft.with_name(f"{draft.name}.old")
    try:
        for name, content in contents.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if target.exists():
            target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise ProgramFileError(f"the program cannot be written to {target}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _laid_out(manifest: Mapping[str, Any]) -> str:
    """JSON with one line for each key, and for each item of its tables."""
    parts = []
    for key, item in manifest.items():
        tables = isinstance(item, list) and item and isinstance(item[0], dict)
        rows = ",\n  ".join(json.dumps(row) for row in item) if tables else ""
        parts.append(f'"{key}": [\n  {rows}\n]' if tables else f'"{key}": {json.dumps(item)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ---------------------------------------------------------------- reading


def load(directory: str | Path) -> AnyProgram:
    """The program that :func:`save` wrote to ``directory``; its operators are the registered ones of this process.

    Unknown output classes become dicts or tuples, with a warning. Raises ProgramFileError if files are missing,
    damaged, of another format version, or name operators that are not registered.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    contents = {name: _verified(directory, name, manifest) for name in (TEXT, CONSTANTS)}
    try:
        plan = Plan.from_json(manifest["plan"])
        structures = {key: _structure(key, manifest["structures"][key]) for key in ("inputs", "outputs")}
        static = {key: _statics(manifest[key]) for key in ("static_inputs", "static_outputs")}
        constants = safetensors.torch.load(contents[CONSTANTS])
        program = parse(contents[TEXT].decode(), plan, constants, origins=True)
    except (ProgramFileError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ProgramFileError(
            f"the program in {directory} cannot be read: {error}\n"
            f"It was written with torch {manifest.get('torch')}, this is torch {torch.__version__}; "
            "import the libraries that define its operators, or save the program again with this version"
        ) from error
    _check_constants(program, constants, directory)
    return replace(
        program,
        in_spec=structures["inputs"],
        out_spec=structures["outputs"],
        passes=tuple(manifest["passes"]),
        constants={name: tensor for name, tensor in constants.items() if not is_of_tail(name)},
        static_inputs=static["static_inputs"],
        static_outputs=static["static_outputs"],
    )


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise ProgramFileError(f"{directory} holds no program: {MANIFEST} is missing") from error
    except OSError as error:
        raise ProgramFileError(f"{directory / MANIFEST} cannot be read: {error}") from error
    except ValueError as error:
        raise ProgramFileError(f"{directory / MANIFEST} is damaged ({error}); save the program again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ProgramFileError(f"{directory / MANIFEST} is not the manifest of an autopar program")
    if found.get("version") != VERSION:
        raise ProgramFileError(
            f"the program in {directory} has format version {found.get('version')}, this autopar reads {VERSION}; "
            "save it again with this version"
        )
    if found.get("sha256") != _checksum(found):
        raise ProgramFileError(f"{directory / MANIFEST} was changed or is damaged; save the program again")
    return found


def _verified(directory: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProgramFileError(f"{path} is missing or cannot be read ({error}); save the program again") from error
    if _entry(content) != manifest["files"].get(name):
        raise ProgramFileError(f"{path} was changed or is damaged (its sha256 is not the manifest's); save it again")
    return content


def _structure(key: str, data: Any) -> pytree.TreeSpec | None:
    spec, unknown = structure_from_json(data)
    if unknown:
        warnings.warn(
            f"the program's {key} use {', '.join(sorted(set(unknown)))}, which is not known here: "
            "plain dicts and tuples stand in (import the classes before loading to get them back)",
            stacklevel=4,
        )
    return spec


def _statics(table: Any) -> tuple[tuple[int, Any], ...]:
    return tuple((int(position), parse_argument(argument)) for position, argument in table)


def _check_constants(program: AnyProgram, constants: Mapping[str, Tensor], directory: Path) -> None:
    for node, entry in program.placeholders(InputKind.CONSTANT):
        expected, found = value(node), constants.get(entry.target)
        if found is None:
            raise ProgramFileError(f"constant '{entry.target}' is missing in {directory / CONSTANTS}")
        if (found.dtype, tuple(found.shape)) != (expected.dtype, expected.shape):
            raise ProgramFileError(
                f"constant '{entry.target}' in {directory / CONSTANTS} is {found.dtype}{list(found.shape)}, "
                f"the program says {expected.dtype}{list(expected.shape)}"
            )
