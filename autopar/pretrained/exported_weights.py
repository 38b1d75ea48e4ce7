"""``autopar export-weights``: from a training checkpoint on disk to the files that ``from_pretrained`` reads.

In one process and without a mesh; one tensor after the other is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from autopar.checkpoint import files
from autopar.checkpoint.checkpoints import read_tensor
from autopar.checkpoint.disk import disk_failed
from autopar.checkpoint.hub_names import not_written
from autopar.checkpoint.matched_names import parts_in_files
from autopar.checkpoint.named_tensors import every_tensor
from autopar.checkpoint.safetensors_file import SafetensorsFile
from autopar.checkpoint.stored_names import Rectangle
from autopar.checkpoint.watched_files import Progress
from autopar.checkpoint.weight_files import Files, held, in_shards, outline, publish, targets
from autopar.errors import CheckpointError
from autopar.pretrained.hub_models import CONFIG, GENERATION, folder_of, meta_model

PREFIX = "model."  # of the names of tensors in a checkpoint


@dataclass(frozen=True)
class ExportedWeights:
    """What was written: from the checkpoint ``path`` of ``step``, ``tensors`` of ``bytes`` in ``files``.

    ``has_config``: whether ``from_pretrained`` can read it; otherwise the names are those of the model that was saved.
    """

    path: Path
    step: int
    files: tuple[str, ...]
    tensors: int
    bytes: int
    has_config: bool


def export_weights(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    step: int | None = None,
    config_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> ExportedWeights:
    """Write the weights of a checkpoint, or of the latest with finite parameters in a folder of them, to ``directory``.

    Args:
        step: the checkpoint of this step.
        config_from: a folder, or a Hub id, with the config of the model; by default what the checkpoint says of it.
        dtype: of the floating-point tensors in the files; by default that in the checkpoint.
        max_shard_size: of one file, in bytes or as ``"5GB"``.

    Raises CheckpointError for a checkpoint that is damaged, or one of another model than the config's, and where there
    are weights already; nothing is left of what was begun then.
    """
    path, target = _chosen(Path(checkpoint), step), Path(directory)
    manifest = files.read_manifest(path)
    metadata = files.read_metadata(path, manifest)
    files.verify(path, manifest, sorted(manifest["files"]), Progress())
    tensors = _tensors(metadata)
    source = folder_of(config_from) if config_from is not None else None
    with held(target) as staged:
        has_config = _write_config(staged, source, manifest.get("pretrained"), dtype or _most_used(tensors))
        parts = _parts(path, staged, tensors) if has_config else _own_names(tensors, metadata)
        dtypes = {name: tensors[name].properties.dtype for name in parts}
        shards = in_shards(targets(dtypes, parts, dtype), max_shard_size)
        try:
            outline(staged, shards, lambda folder: None)
            _write(path, metadata, tensors, shards, staged)
        except OSError as problem:
            raise disk_failed(target.absolute().parent, problem) from None
        names = tuple(sorted(one.name for one in staged.iterdir()))
        publish(staged, target)
    written = [one for members in shards.values() for one in members]
    count = sum(one.bytes for one in written)
    return ExportedWeights(path, manifest["step"], names, len(written), count, has_config)


def _chosen(place: Path, step: int | None) -> Path:
    """The checkpoint: ``place`` itself, or one in it."""
    if (place / files.MANIFEST).is_file() and step is None:
        return place
    there = files.complete(place)
    wanted = step if step is not None else files.latest_finite(place)
    if wanted not in there:
        known = f"of steps {', '.join(map(str, there))}" if there else "none"
        kind = f"no checkpoint of step {step}" if step is not None else "no checkpoint with finite parameters"
        way_out = "Way out: the folder that Checkpoints saves to."
        raise CheckpointError(f"'{place}' has {kind}; there are: {known}\n{way_out}")
    return there[wanted]


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name in the model -> shape and dtype, of all tensors of the model in a checkpoint."""
    items = metadata.state_dict_metadata.items()
    return {
        name.removeprefix(PREFIX): item
        for name, item in items
        if name.startswith(PREFIX) and isinstance(item, TensorStorageMetadata)
    }


def _most_used(tensors: Mapping[str, TensorStorageMetadata]) -> torch.dtype:
    """The floating-point dtype of most numbers."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for item in tensors.values():
        dtype = item.properties.dtype
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + item.size.numel()
    return max(sizes, key=sizes.__getitem__)


def _write_config(staged: Path, source: Path | None, known: Mapping[str, Any] | None, dtype: torch.dtype) -> bool:
    """Put the config, and that of ``generate``, into the folder; whether there is one."""
    found: dict[str, Any] = {}
    if source is not None:
        there = [name for name in (CONFIG, GENERATION) if (source / name).is_file()]
        found = {name: json.loads((source / name).read_text(encoding="utf-8")) for name in there}
    elif known is not None:
        found = {name: known[name] for name in (CONFIG, GENERATION) if known.get(name) is not None}
    for name, content in found.items():
        more = {"dtype": str(dtype).removeprefix("torch.")} if name == CONFIG else {}
        (staged / name).write_text(json.dumps(content | more, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return bool(found)


def _parts(path: Path, staged: Path, tensors: Mapping[str, TensorStorageMetadata]) -> dict[str, dict[str, Rectangle]]:
    """The names in files of the model of the config in ``staged``. Raises CheckpointError for another model."""
    model = meta_model(staged, None, None, None, trust_remote_code=False)
    entries = [entry for entry in every_tensor(model) if entry.persistent and entry.name not in not_written(model)]
    wrong = [entry for entry in entries if entry.name not in tensors or tensors[entry.name].size != entry.shape]
    known = {name for entry in every_tensor(model) for name in entry.names}
    more = [name for name in tensors if name not in known]
    if wrong or more:
        one = wrong[0].name if wrong else more[0]
        here = list(wrong[0].shape) if wrong else "nothing"
        there = list(tensors[one].size) if one in tensors else "nothing"
        raise CheckpointError(
            f"'{path}' is no checkpoint of {type(model).__name__} with this config: {len(wrong) + len(more)} tensors "
            f"differ, the first is '{one}', {there} in the checkpoint and {here} in the model\n"
            "Way out: --config-from, a folder with the config of the model that was trained."
        )
    return parts_in_files(model, entries)


def _own_names(tensors: Mapping[str, TensorStorageMetadata], metadata: Metadata) -> dict[str, dict[str, Rectangle]]:
    """Each tensor under its own name; of tied ones, which a checkpoint has once, the first name."""
    places: dict[Any, str] = {}
    for index, place in (metadata.storage_data or {}).items():
        if index.fqn.removeprefix(PREFIX) in tensors:
            key = (place.relative_path, place.offset)
            name = index.fqn.removeprefix(PREFIX)
            places[key] = min(places.get(key, name), name)
    first = set(places.values())
    return {name: {name: Rectangle.of_all(item.size)} for name, item in tensors.items() if name in first}


def _write(
    path: Path, metadata: Metadata, tensors: Mapping[str, TensorStorageMetadata], shards: Files, staged: Path
) -> None:
    """Copy one tensor after the other from the checkpoint into the files of ``shards``."""
    uses: dict[str, list[tuple[str, str, Rectangle]]] = {}  # name in the model -> (file, name in it, what of it)
    for file_name, members in shards.items():
        for target in members:
            for name, rectangle in target.parts:
                uses.setdefault(name, []).append((file_name, target.name, rectangle))
    with ExitStack() as stack:
        opened = {name: SafetensorsFile(staged / name, writable=True) for name in shards}
        for file in opened.values():
            stack.callback(file.close)
        for name, places in uses.items():
            item = tensors[name]
            whole = read_tensor(path, metadata, f"{PREFIX}{name}", item.size, item.properties.dtype)
            for file_name, stored, rectangle in places:
                common = rectangle.common((0,) * whole.dim(), whole)
                if common is not None:
                    opened[file_name].write(stored, *common)
        for file in opened.values():
            file.sync()
