"""Weights in Hugging Face's sharded safetensors files: each rank reads, and writes, only its own slices of them.

with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = autopar.parallelize(model, mesh, example_inputs=batch)
autopar.load_safetensors(model, "Llama-2-7b-hf/")
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.checkpoint.directory_lock import hold_directory
from autopar.checkpoint.disk import disk_failed, sync_directory
from autopar.checkpoint.initialise import initialise
from autopar.checkpoint.named_tensors import Named, every_tensor, materialise
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.safetensors_file import SafetensorsFile, create
from autopar.checkpoint.stored_names import Rectangle, stored_names
from autopar.checkpoint.watched_files import Progress
from autopar.errors import CheckpointError
from autopar.module import held_by
from autopar.plain_files import read_plain
from autopar.runtime.dtensor import local_of
from autopar.runtime.slices import Slices

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 1 << 28  # bytes
PARTIAL = ".weights.partial"
logger = logging.getLogger("autopar")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class LoadedWeights:
    """Names of the model's tensors: from the files (``loaded``), by the model's initialisation (``initialised``).

    ``unused``: names in the files that the model does not have. ``bytes_read``: of data, by this rank. On a pipeline,
    each rank reads the tensors of its stages, and knows of the parameters of all.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]
    bytes_read: int


def load_safetensors(
    model: nn.Module, directory: str | Path, *, seed: int = 0, rename: Callable[[str], str] | None = None
) -> LoadedWeights:
    """Fill ``model``, which may be on the meta device, from the ``*.safetensors`` files in ``directory``.

    Values are cast to the dtype that the model has. A parameter without an entry, and a buffer on the meta device, gets
    the numbers of the model's own initialisation, the same on any mesh. Without communication.

    Args:
        seed: of that initialisation.
        rename: gives the model's name for a name in the files. Without it, names may lack, or have, the prefix of a
            Hugging Face base model (``transformer.`` of GPT-2). Otherwise they are the model's own, or those that
            ``transformers`` converts while it loads (``stored_names.py``: an expert each).

    Raises CheckpointError, and nothing has changed then, for files that are damaged or those of another model.
    """
    if not held_by(model).weights.is_laid_out:
        raise CheckpointError(
            "how the parameters are split is not known yet\n"
            "Way out: first model.prepare(**batch), or parallelize(..., example_inputs=batch)."
        )
    entries = every_tensor(model)
    converted = _stored_names(model, entries)
    known = {name for entry in entries for name in (*entry.names, *converted[entry.name])}
    naming = rename or _prefixed(model, known)
    with ExitStack() as stack:
        found: dict[str, tuple[SafetensorsFile, str]] = {}
        for path in _files(Path(directory)):
            file = SafetensorsFile(path)
            stack.callback(file.close)
            for name in file.entries:
                found[naming(name)] = (file, name)
        sources = {entry.name: _sources(entry, converted[entry.name], found) for entry in entries}
        loaded = [entry for entry in entries if sources[entry.name]]
        held = [entry for entry in loaded if entry.held]
        arrived = {entry.name: entry.slices.empty_on_cpu() for entry in held}  # the model has them once all are read
        count = sum(_read(arrived[entry.name], sources[entry.name]) for entry in held)
    missing = [entry for entry in entries if not sources[entry.name] and _needs_data(entry)]
    initialise(model, [entry for entry in missing if entry.held], seed)
    for entry in held:
        materialise(model, [entry])
        entry.slices.local.copy_(arrived.pop(entry.name).local)
    unused = tuple(name for called, (_, name) in found.items() if called not in known)
    _tell([entry.name for entry in missing if isinstance(entry.tensor, nn.Parameter)], unused)
    return LoadedWeights(tuple(e.name for e in loaded), tuple(e.name for e in missing), unused, count)


def save_safetensors(model: nn.Module, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write the parameters and buffers of ``model``'s state dict, tied ones once under their first name.

    They are written as ``model.safetensors`` or as several files with an index. Those of a Hugging Face model have the
    names of its own files, and its ``config`` is written beside them. Collective: each rank writes its own slices.
    ``directory``, which all ranks see, has the files when all are complete.

    Args:
        max_shard_size: of one file, in bytes or as ``"5GB"`` (powers of 1000).

    Raises CheckpointError where there are weights already, where another process saves to the directory, or for a full
    disk; nothing is left of what was begun then. RankFailedError.
    """
    directory, peers = Path(directory), Peers(model)
    entries = [entry for entry in every_tensor(model) if entry.persistent]
    empty = next((entry.name for entry in entries if entry.held and local_of(entry.tensor).is_meta), None)
    if empty is not None:
        raise CheckpointError(f"'{empty}' has no data: the model was built on the meta device")
    converted = _stored_names(model, entries)
    tensors = [Target(name, entry, part) for entry in entries for name, part in converted[entry.name].items()]
    shards = _shards(tensors, _bytes(max_shard_size))
    with ExitStack() as stack:
        with peers.agreed("saving weights"):
            if peers.rank == 0:
                stack.callback(hold_directory(directory).release)
                stack.callback(shutil.rmtree, directory / PARTIAL, ignore_errors=True)
                _prepare(model, directory, shards)
        with peers.agreed("saving weights"):
            _write_all(directory / PARTIAL, shards, peers)
        with peers.agreed("saving weights"):
            if peers.rank == 0:
                _publish(directory)


def _files(directory: Path) -> list[Path]:
    """The files that hold the weights in ``directory`` (or ``directory`` itself, if it is one)."""
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
            raise CheckpointError(f"'{directory}' has neither {FILE} nor {INDEX}, and {len(names)} *.safetensors files")
    lost = [name for name in names if not (directory / name).is_file()]
    if lost:
        raise CheckpointError(f"'{directory}' lacks {len(lost)} of {len(names)} files, the first is {lost[0]}")
    return [directory / name for name in names]


def _refuse_paths(names: Sequence[str]) -> None:
    """Raise ValueError for a name that leads to a file of another directory."""
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r:.80} is no name of a file in this directory")


def _prefixed(model: nn.Module, known: Collection[str]) -> Callable[[str], str]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def naming(name: str) -> str:
        return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), name)

    return naming


def _tell(initialised: Sequence[str], unused: Sequence[str]) -> None:
    if not initialised or dist.is_initialized() and dist.get_rank():
        return
    others = f"; of the files {len(unused)} entries are unused, '{unused[0]}' ..." if unused else ""
    text = "%d parameters have no entry in the files and were initialised: '%s' ...%s"
    logger.warning(text, len(initialised), initialised[0], others)


@dataclass(frozen=True)
class Source:
    """A tensor in a file, which is a rectangle of one of the model."""

    file: SafetensorsFile
    name: str
    rectangle: Rectangle


def _read(slices: Slices, sources: Sequence[Source]) -> int:
    """Fill what this rank has of a tensor; gives the bytes read. Raises CheckpointError."""
    total = 0
    for (offsets, view), source in itertools.product(slices.pieces(), sources):
        common = source.rectangle.common(offsets, view)
        try:
            total += source.file.read(source.name, *common) if common is not None else 0
        except OSError as problem:
            raise CheckpointError(f"'{source.file.path}': {problem}") from None
    return total


def _sources(
    entry: Named, converted: Mapping[str, Rectangle], found: Mapping[str, tuple[SafetensorsFile, str]]
) -> list[Source]:
    """The tensors in the files that make up ``entry``: it itself, or those that it is converted from; [] for none."""
    own = next((name for name in entry.names if name in found), None)
    parts = {own: Rectangle.of_all(entry.shape)} if own is not None else converted
    lost = [name for name in parts if name not in found]
    if len(lost) == len(parts):
        return []
    if lost:
        raise CheckpointError(f"'{entry.name}' is {len(parts)} tensors in files, which lack {len(lost)}: '{lost[0]}'")
    for name, rectangle in parts.items():
        file, stored = found[name]
        there, here = file.entries[stored].shape, rectangle.shape
        if there != here:
            raise CheckpointError(f"'{stored}' in '{file.path}' is {list(there)}, and in this model it is {list(here)}")
        theirs, ours = file.entries[stored].dtype, entry.tensor.dtype
        if _kind(theirs) != _kind(ours):
            raise CheckpointError(f"'{stored}' in '{file.path}' is {theirs}, and in this model it is {ours}")
    return [Source(*found[name], rectangle) for name, rectangle in parts.items()]


def _kind(dtype: torch.dtype) -> str:
    """Numbers of one kind are cast to each other; whole numbers in place of others are another tensor."""
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def _stored_names(model: nn.Module, entries: Sequence[Named]) -> dict[str, dict[str, Rectangle]]:
    """Name of each of ``entries`` -> names in files -> what of it they have."""
    holding = held_by(model)
    outlines = {one.name: torch.empty(one.shape, dtype=one.tensor.dtype, device="meta") for one in entries}
    with holding.weights.traceable():
        return stored_names(holding.model, outlines)


def _needs_data(entry: Named) -> bool:
    return isinstance(entry.tensor, nn.Parameter) or (entry.held and local_of(entry.tensor).is_meta)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f"max_shard_size={size!r}: bytes, or a number with one of {', '.join(UNITS)}") from None


@dataclass(frozen=True)
class Target:
    """A tensor to write: a rectangle of ``entry``, under the name that files have for it."""

    name: str
    entry: Named
    rectangle: Rectangle

    @property
    def bytes(self) -> int:
        return math.prod(self.rectangle.shape) * self.entry.tensor.itemsize


def _shards(entries: Sequence[Target], largest: int) -> dict[str, list[Target]]:
    """File name -> its content, in the order of the model."""
    groups: list[list[Target]] = [[]]
    filled = 0
    for entry in entries:
        size = entry.bytes
        if groups[-1] and filled + size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    if len(groups) == 1:
        return {FILE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _prepare(model: nn.Module, directory: Path, shards: Mapping[str, Sequence[Target]]) -> None:
    """Everything but the data, in the partial directory."""
    there = sorted(path.name for path in directory.glob("model*.safetensors*"))
    if there:
        raise CheckpointError(f"'{directory}' has weights already ({there[0]})\nWay out: another directory.")
    partial = directory / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: this one has the lock
    partial.mkdir(parents=True)
    for name, members in shards.items():
        create(partial / name, {one.name: (one.entry.tensor.dtype, one.rectangle.shape) for one in members})
    if len(shards) > 1:
        total = sum(one.bytes for members in shards.values() for one in members)
        where = {entry.name: name for name, members in shards.items() for entry in members}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if callable(getattr(config, "save_pretrained", None)):
            config.save_pretrained(partial)


def _write_all(partial: Path, shards: Mapping[str, Sequence[Target]], peers: Peers) -> None:
    """This rank's part of every file, beside the other ranks. Raises CheckpointError."""
    progress = Progress()

    def write() -> None:
        for name, members in shards.items():
            _write(partial / name, members, progress)

    try:
        peers.side_by_side("saving weights", write, progress)
    except OSError as problem:
        raise disk_failed(partial.parent, problem) from None


def _publish(directory: Path) -> None:
    """Give the files that are complete their place."""
    paths = (directory / PARTIAL).iterdir()
    for path in sorted(paths, key=lambda path: path.name == INDEX):  # the index comes last
        path.replace(directory / path.name)
    sync_directory(directory)


def _write(path: Path, members: Sequence[Target], progress: Progress) -> None:
    file = SafetensorsFile(path, writable=True)
    try:
        for _, group in itertools.groupby(members, key=lambda one: one.entry.name):
            of_one = list(group)
            entry = of_one[0].entry
            part = entry.slices if entry.held else None
            if part is not None and part.first:
                for (offsets, piece), one in itertools.product(part.pieces(), of_one):
                    common = one.rectangle.common(offsets, piece)
                    if common is not None:
                        file.write(one.name, *common)
                        progress.advance()
        file.sync()
    finally:
        file.close()
