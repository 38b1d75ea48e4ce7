"""Weights in Hugging Face's safetensors files, into a model: each rank reads only its own slices of them.

with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = autopar.parallelize(model, mesh, example_inputs=batch)
autopar.load_safetensors(model, "Llama-2-7b-hf/")
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from autopar.checkpoint.initialise import initialise
from autopar.checkpoint.matched_names import in_files, refuse_unmatched
from autopar.checkpoint.named_tensors import Named, every_tensor, materialise
from autopar.checkpoint.safetensors_file import SafetensorsFile
from autopar.checkpoint.stored_names import Rectangle
from autopar.checkpoint.weight_files import files_of
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.slices import Slices
from autopar.errors import CheckpointError
from autopar.module import held_by

logger = logging.getLogger("autopar")


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
    model: nn.Module,
    directory: str | Path,
    *,
    seed: int = 0,
    rename: Callable[[str], str] | None = None,
    strict: bool = False,
) -> LoadedWeights:
    """Fill ``model``, which may be on the meta device, from the ``*.safetensors`` files in ``directory``.

    Values are cast to the dtype that the model has. A parameter without an entry, and a buffer on the meta device, gets
    the numbers of the model's own initialisation, the same on any mesh. Without communication.

    Args:
        seed: of that initialisation.
        rename: gives the model's name for a name in the files. Without it, names may lack, or have, the prefix of a
            Hugging Face base model (``transformer.`` of GPT-2). Otherwise they are the model's own, or those that
            ``transformers`` converts while it loads (``stored_names.py``: an expert each).
        strict: a tensor of the model's state dict without an entry, and an entry that the model does not use, is an
            error, but for those that a Hugging Face model's class says may be missing, or unused.

    Raises CheckpointError, and nothing has changed then, for files that are damaged or those of another model.
    """
    if not held_by(model).weights.is_laid_out:
        raise CheckpointError(
            "how the parameters are split is not known yet\n"
            "Way out: first model.prepare(**batch), or parallelize(..., example_inputs=batch)."
        )
    entries = every_tensor(model)
    with ExitStack() as stack:
        stored: dict[str, SafetensorsFile] = {}
        for path in files_of(Path(directory)):
            file = SafetensorsFile(path)
            stack.callback(file.close)
            stored |= dict.fromkeys(file.entries, file)
        names = in_files(model, entries, list(stored), rename)
        found = {names.of_model(name): (file, name) for name, file in stored.items()}
        sources = {entry.name: _sources(entry, names.parts[entry.name], found) for entry in entries}
        unused = tuple(name for called, (_, name) in found.items() if called not in names.known)
        lacking = [entry for entry in entries if not sources[entry.name]]
        if strict:
            refuse_unmatched(model, directory, [entry.name for entry in lacking if entry.persistent], unused, names)
        loaded = [entry for entry in entries if sources[entry.name]]
        held = [entry for entry in loaded if entry.held]
        arrived = {entry.name: entry.slices.empty_on_cpu() for entry in held}  # the model has them once all are read
        count = sum(_read(arrived[entry.name], sources[entry.name]) for entry in held)
    missing = [entry for entry in lacking if _needs_data(entry)]
    initialise(model, [entry for entry in missing if entry.held], seed)
    for entry in held:
        materialise(model, [entry])
        entry.slices.local.copy_(arrived.pop(entry.name).local)
    _tell([entry.name for entry in missing if isinstance(entry.tensor, nn.Parameter)], unused)
    return LoadedWeights(tuple(e.name for e in loaded), tuple(e.name for e in missing), unused, count)


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


def _needs_data(entry: Named) -> bool:
    return isinstance(entry.tensor, nn.Parameter) or (entry.held and local_of(entry.tensor).is_meta)
