"""Weights of a model, parallel or not, as Hugging Face's safetensors files: each rank writes only its own slices.

autopar.save_pretrained(model, "run/final", tokenizer=tokenizer)    # with config.json: for from_pretrained
autopar.save_safetensors(model, "run/weights")                      # any model
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.checkpoint.disk import disk_failed
from autopar.checkpoint.hub_names import not_written
from autopar.checkpoint.matched_names import parts_in_files
from autopar.checkpoint.named_tensors import Named, every_tensor
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.safetensors_file import SafetensorsFile
from autopar.checkpoint.watched_files import Progress
from autopar.checkpoint.weight_files import Files, held, in_shards, outline, publish, targets
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.slices import Slices
from autopar.errors import CheckpointError
from autopar.module import held_by


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write what ``from_pretrained`` of ``transformers`` reads: weights, config, and the config of ``generate``.

    Names and layouts in the files are those of the Hub (an expert each, one of tied tensors); collective, and otherwise
    as :func:`save_safetensors`.

    Args:
        tokenizer: what else goes to the directory: a tokenizer, a processor, or anything with ``save_pretrained``.
        dtype: of the floating-point tensors in the files; without it that of each parameter.

    Raises CheckpointError also for a model without a config.
    """
    if getattr(held_by(model).model, "peft_config", None):
        raise CheckpointError(
            "the model has adapters of peft, which go to files of their own\n"
            "Way out: plain = autopar.gather(model) on all ranks, then on rank 0 plain.save_pretrained(directory), or\n"
            "plain.merge_and_unload().save_pretrained(directory) for a model without adapters."
        )
    config = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        kind = type(held_by(model).model).__name__
        raise CheckpointError(
            f"{kind} has no config that from_pretrained could read\n"
            "Way out: autopar.save_safetensors(model, directory), which writes the weights of any model."
        )
    _save(model, Path(directory), max_shard_size, dtype, partial(_write_pretrained, model, dtype, tokenizer))


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
    _save(model, Path(directory), max_shard_size, None, partial(_write_pretrained, model, None, None))


def _save(
    model: nn.Module,
    directory: Path,
    max_shard_size: int | str,
    dtype: torch.dtype | None,
    beside: Callable[[Path], None],
) -> None:
    peers = Peers(model)
    left_out = not_written(held_by(model).model)
    entries = [entry for entry in every_tensor(model) if entry.persistent and entry.name not in left_out]
    empty = next((entry.name for entry in entries if entry.held and local_of(entry.tensor).is_meta), None)
    if empty is not None:
        raise CheckpointError(f"'{empty}' has no data: the model was built on the meta device")
    dtypes = {entry.name: entry.tensor.dtype for entry in entries}
    files = in_shards(targets(dtypes, parts_in_files(model, entries), dtype), max_shard_size)
    with ExitStack() as stack:
        staged: Path | None = None
        with peers.agreed("saving weights"):
            if peers.rank == 0:
                staged = stack.enter_context(held(directory))
                outline(staged, files, beside)
        staged = Path(peers.of_first(str(staged)))
        with peers.agreed("saving weights"):
            _write_all(staged, files, {entry.name: entry for entry in entries}, peers)
        with peers.agreed("saving weights"):
            if peers.rank == 0:
                publish(staged, directory)


def _write_pretrained(model: nn.Module, dtype: torch.dtype | None, also: Any, directory: Path) -> None:
    """The config as ``transformers`` writes it: with the class and the dtype of what is in the files."""
    inner = held_by(model).model
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "save_pretrained", None)):
        config = copy.deepcopy(config)
        config.architectures = [type(inner).__name__]
        config.dtype = str(dtype or _dtype_of(model)).removeprefix("torch.")
        config.save_pretrained(directory)
    others: tuple[Any, ...] = (getattr(model, "generation_config", None), also)
    for other in others:
        if callable(getattr(other, "save_pretrained", None)):
            other.save_pretrained(directory)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter, as ``transformers`` says it of a model."""
    found = (entry.tensor.dtype for entry in every_tensor(model) if entry.tensor.is_floating_point())
    return next(found, torch.float32)


def _write_all(staged: Path, files: Files, entries: Mapping[str, Named], peers: Peers) -> None:
    """This rank's part of every file, beside the other ranks. Raises CheckpointError."""
    progress = Progress()

    def write() -> None:
        for name, members in files.items():
            _write(staged / name, members, entries, progress)

    try:
        peers.side_by_side("saving weights", write, progress)
    except OSError as problem:
        raise disk_failed(staged.parent.parent, problem) from None


def _write(path: Path, members: Any, entries: Mapping[str, Named], progress: Progress) -> None:
    file = SafetensorsFile(path, writable=True)
    try:
        held_here: dict[str, Slices] = {}
        for target in members:
            for name, rectangle in target.parts:
                entry = entries[name]
                if not entry.held:
                    continue
                part = held_here[name] if name in held_here else held_here.setdefault(name, entry.slices)
                for offsets, piece in part.pieces() if part.first else ():
                    common = rectangle.common(offsets, piece)
                    if common is not None:
                        file.write(target.name, *common)
                        progress.advance()
        file.sync()
    finally:
        file.close()
