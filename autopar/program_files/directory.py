"""The files of a program in its directory: written all or none; read one by one, bounded, with their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from autopar.errors import ProgramFileError
from autopar.plain_files import read_plain
from autopar.program_files.exchange import old_of, put
from autopar.program_files.manifest import FORMAT, VERSION

MANIFEST, TEXT, CONSTANTS = "manifest.json", "program.txt", "constants.safetensors"
SOURCE, SOURCE_OF_TAIL = "source.txt", "source_of_tail.txt"  # of programs that keep their source
SIZES, LONGEST = "sizes.json", "longest.safetensors"  # of a family: its expressions, and the constants that change
MOST_BYTES = {
    **dict.fromkeys((MANIFEST, TEXT, SOURCE, SOURCE_OF_TAIL, SIZES), 1 << 28),
    **dict.fromkeys((CONSTANTS, LONGEST), 1 << 36),
}

# ---------------------------------------------------------------- writing


def checked_names(files: Mapping[str, str]) -> dict[str, str]:
    """Files for people by their path in the directory. Raises ProgramFileError for a path that leads elsewhere."""
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise ProgramFileError(f"extra file '{name}': a relative path without '..' is needed")
        if str(path) in MOST_BYTES:
            raise ProgramFileError(f"extra file '{name}' has the name of a file of the program itself")
    return {str(PurePosixPath(name)): content for name, content in files.items()}


def refuse_strangers(target: Path) -> None:
    """Raise ProgramFileError unless ``target`` is missing, empty, or holds a program and nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ProgramFileError(f"{target} is a file\nWay out: give the name of a directory.")
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    try:
        manifest = read_manifest(target) if present else {"files": (), "extra_files": ()}
        ours = {MANIFEST, *map(str, (*manifest["files"], *manifest["extra_files"]))}
    except (ProgramFileError, KeyError, TypeError) as error:
        raise ProgramFileError(
            f"{target} is not empty and holds no program; save into another directory\nWay out: -o NEW."
        ) from error
    strangers = sorted(present - ours)
    if strangers:
        raise ProgramFileError(
            f"{target} holds files that are not of the program there: {', '.join(strangers[:5])}; "
            "move them away, or save into another directory"
        )


def write(contents: Mapping[str, bytes], target: Path) -> None:
    """Write everything to a directory beside ``target``, which then takes its place at once.

    A process that is killed while it writes leaves what was there, and the unfinished directory under another name.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for name, content in contents.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        put(draft, target)
    except OSError as error:
        raise ProgramFileError(
            f"the program cannot be written to {target}: {error}\nWay out: another directory."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def entry(content: bytes) -> dict[str, Any]:
    """The manifest's line on a file of the program."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of all that the manifest says. It finds damage; whoever changes a program on purpose can compute it too."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def laid_out(manifest: Mapping[str, Any]) -> str:
    """JSON with one line for each key, and for each item of its tables."""
    parts = []
    for key, item in manifest.items():
        tables = isinstance(item, list) and item and isinstance(item[0], dict)
        rows = ",\n  ".join(json.dumps(row) for row in item) if tables else ""
        parts.append(f'"{key}": [\n  {rows}\n]' if tables else f'"{key}": {json.dumps(item)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ---------------------------------------------------------------- reading


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, of this format and version and with its checksum. Raises ProgramFileError."""
    path = directory / MANIFEST
    try:
        found = json.loads(read_plain(path, MOST_BYTES[MANIFEST], inside=directory))
        whole = isinstance(found, dict) and found.get("sha256") == checksum(found)
    except FileNotFoundError as error:
        raise ProgramFileError(_missing(directory)) from error
    except OSError as error:
        raise ProgramFileError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ProgramFileError(f"{path} is damaged ({str(error):.200}); save the program again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ProgramFileError(f"{path} is not the manifest of an autopar program")
    if found.get("version") != VERSION:
        raise ProgramFileError(
            f"the program in {directory} has format version {str(found.get('version')):.20}, this autopar reads "
            f"{VERSION}; save it again with this version"
        )
    if not whole:
        raise ProgramFileError(f"{path} was changed or is damaged; save the program again")
    return found


def _missing(directory: Path) -> str:
    old = old_of(directory)
    moved = f"\nA process that was killed has left the one before as {old}: rename it." if old.is_dir() else ""
    return f"{directory} holds no program: {MANIFEST} is missing{moved}\nWay out: autopar compile MODEL -o {directory}."


def verified(directory: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The content of a file of the program, as the manifest describes it. Raises ProgramFileError."""
    path, files = directory / name, manifest.get("files")
    said = files.get(name) if isinstance(files, dict) else None
    size = said.get("bytes") if isinstance(said, dict) else None
    if not isinstance(size, int) or not 0 <= size <= MOST_BYTES[name]:
        raise ProgramFileError(f"{directory / MANIFEST} gives no size of {name}, or one that no program has")
    try:
        content = read_plain(path, MOST_BYTES[name], inside=directory) if path.stat().st_size == size else b""
    except OSError as error:
        raise ProgramFileError(f"{path} is missing or cannot be read ({error}); save the program again") from error
    if entry(content) != said:
        raise ProgramFileError(f"{path} was changed or is damaged (its sha256 is not the manifest's); save it again")
    return content
