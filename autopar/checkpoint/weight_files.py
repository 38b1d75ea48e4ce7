"""The files of a model's weights, as Hugging Face names them; written whole or not at all.

model.safetensors
model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from autopar.checkpoint.directory_lock import hold_directory
from autopar.checkpoint.disk import sync_directory
from autopar.checkpoint.safetensors_file import create
from autopar.checkpoint.stored_names import Rectangle
from autopar.errors import CheckpointError
from autopar.plain_files import read_plain

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 1 << 28  # bytes
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Target:
    """A tensor of the files. ``parts``: (name of a tensor of the model, what of it the tensor has)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[str, Rectangle], ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Files = Mapping[str, Sequence[Target]]  # name of a file -> its content


def targets(
    dtypes: Mapping[str, torch.dtype], stored: Mapping[str, Mapping[str, Rectangle]], dtype: torch.dtype | None = None
) -> list[Target]:
    """The tensors of the files for those of a model, in its order.

    Args:
        dtypes: of the model's tensors, by name.
        stored: name of such a tensor -> names in files -> what of it they have (``stored_names.py``).
        dtype: for floating-point ones, in place of their own.
    """
    parts: dict[str, list[tuple[str, Rectangle]]] = {}
    for name in dtypes:
        for in_files, rectangle in stored[name].items():
            parts.setdefault(in_files, []).append((name, rectangle))
    found = []
    for in_files, own in parts.items():
        kept = dtypes[own[0][0]]
        written = dtype if dtype is not None and kept.is_floating_point else kept
        found.append(Target(in_files, own[0][1].shape, written, tuple(own)))
    return found


def in_shards(entries: Sequence[Target], largest: int | str) -> Files:
    """File name -> its content, in order. ``largest``: of one file, in bytes or as ``"5GB"`` (powers of 1000)."""
    limit = _bytes(largest)
    groups: list[list[Target]] = [[]]
    filled = 0
    for entry in entries:
        size = entry.bytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    if len(groups) == 1:
        return {FILE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def files_of(directory: Path) -> list[Path]:
    """The files with the weights in ``directory``, or ``directory`` itself, if it is one. Raises CheckpointError."""
    if directory.is_file():
        return [directory]
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(read_plain(index, LARGEST_INDEX))["weight_map"].values()))
            _refuse_paths(names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{index}' is damaged: {error!r:.200}") from None
    elif (directory / FILE).is_file():
        names = [FILE]
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(names) != 1:
            raise CheckpointError(_no_files(directory, len(names)))
    lost = [name for name in names if not (directory / name).is_file()]
    if lost:
        raise CheckpointError(f"'{directory}' lacks {len(lost)} of {len(names)} files, the first is {lost[0]}")
    return [directory / name for name in names]


def _no_files(directory: Path, others: int) -> str:
    text = f"'{directory}' has neither {FILE} nor {INDEX}, and {others} *.safetensors files"
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickles:
        text += (
            f"; {pickles[0]} is a pickle, which can run code\n"
            "Way out: where it is trusted, once: transformers' from_pretrained(...).save_pretrained(a new folder)."
        )
        return text
    return f"{text}\nWay out: a folder with one of these, as save_safetensors and save_pretrained write it."


def _refuse_paths(names: Sequence[str]) -> None:
    """Raise ValueError for a name that leads to a file of another directory."""
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r:.80} is no name of a file in this directory")


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f"max_shard_size={size!r}: bytes, or a number with one of {', '.join(UNITS)}") from None


# ---------------------------------------------------------------- a directory that has all of them, or none


PARTIAL, STAGED = ".weights.partial", "files"


def partial_of(directory: Path) -> Path:
    """Where files are while they are written: beside ``directory``; in it, where that is on another disk."""
    directory = directory.absolute()
    parent = directory.parent
    if directory.is_dir() and (not os.access(parent, os.W_OK) or parent.stat().st_dev != directory.stat().st_dev):
        return directory / PARTIAL
    return parent / f".{directory.name}{PARTIAL}"


@contextmanager
def held(directory: Path) -> Iterator[Path]:
    """A new directory for the files of ``directory``, gone at the end; locked for this process.

    Raises CheckpointError where there are weights, or another process writes them.
    """
    there = sorted(path.name for path in directory.glob("model*.safetensors*")) if directory.is_dir() else []
    if there:
        raise CheckpointError(f"'{directory}' has weights already ({there[0]})\nWay out: another directory.")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"'{directory}' is a file\nWay out: the name of a directory.")
    partial = partial_of(directory)
    lock = hold_directory(partial)
    staged = partial / STAGED
    try:
        shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed: this one has the lock
        staged.mkdir()
        yield staged
    finally:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)


def outline(staged: Path, files: Files, beside: Callable[[Path], None]) -> None:
    """Files of their full size with no data yet, their index, and what ``beside(folder)`` writes."""
    for name, members in files.items():
        create(staged / name, {one.name: (one.dtype, one.shape) for one in members})
    if len(files) > 1:
        total = sum(one.bytes for members in files.values() for one in members)
        where = {one.name: name for name, members in files.items() for one in members}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    beside(staged)


def publish(staged: Path, directory: Path) -> None:
    """Give complete files their place: by one renaming, unless ``directory`` has other files already."""
    with suppress(OSError):  # it has files
        directory.rmdir()
    if not directory.exists():
        staged.replace(directory)
        sync_directory(directory.absolute().parent)
        return
    for path in sorted(staged.iterdir(), key=lambda path: path.name == INDEX):  # the index comes last
        path.replace(directory / path.name)
    sync_directory(directory)
