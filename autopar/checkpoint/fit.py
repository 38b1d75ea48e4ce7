"""Whether a checkpoint fits a model and its optimizers: names, shapes, dtypes, groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from autopar.checkpoint.named_tensors import Named
from autopar.checkpoint.training_state import Owners
from autopar.errors import CheckpointError
from autopar.module import held_by

NAMES_SHOWN = 3


def refuse_other_model(path: Path, entries: Sequence[Named], metadata: Metadata) -> None:
    """Raises CheckpointError, which lists what differs."""
    items, prefix = metadata.state_dict_metadata, "model."
    stored = {name.removeprefix(prefix): kind for name, kind in items.items() if name.startswith(prefix)}
    wanted = {name: entry for entry in entries for name in entry.names}
    missing, more = [name for name in wanted if name not in stored], [name for name in stored if name not in wanted]
    problems = [f"it lacks {_listed(missing)}"] if missing else []
    problems += [f"it has {_listed(more)}, which this model does not have"] if more else []
    there = [(name, entry) for name, entry in wanted.items() if name in stored]
    kinds = [(name, _kind(stored[name]), _kind(entry.tensor, entry.shape)) for name, entry in there]
    unlike = [f"'{name}' is {one} in it and {other} here" for name, one, other in kinds if one != other]
    problems += unlike[:NAMES_SHOWN]
    if problems:
        raise CheckpointError(f"'{path}' is a checkpoint of another model:\n  " + "\n  ".join(problems))


def refuse_other_optimizers(path: Path, model: nn.Module, owners: Owners, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError."""
    names = [type(optimizer).__name__ for optimizer in owners.optimizers]
    if not names:
        return
    if names != manifest["optimizers"]:
        there = ", ".join(manifest["optimizers"]) or "no optimizer"
        raise CheckpointError(f"'{path}' has the state of {there}, and this is {', '.join(names)}")
    here = [members for _, members in owners.groups()]
    saved = [[member for name in group for member in owners.members(name)] for group in manifest["groups"]]
    if list(map(sorted, here)) != list(map(sorted, saved)):
        sizes = [f"{len(groups)} groups of {list(map(len, groups))}" for groups in (manifest["groups"], here)]
        raise CheckpointError(
            f"'{path}' has {sizes[0]} parameters in its optimizer, and here there are {sizes[1]}, or others\n"
            "Way out: give the optimizer the parameters in the same groups."
        )
    if not held_by(model).weights.is_laid_out:
        raise CheckpointError(
            "how the parameters are split is not known yet, so their optimizer states cannot be loaded\n"
            "Way out: first model.prepare(**batch), or parallelize(..., example_inputs=batch)."
        )


def _kind(tensor: Tensor | TensorStorageMetadata | BytesStorageMetadata, shape: Sequence[int] = ()) -> str:
    """The dtype and the shape of what a checkpoint has, or of a tensor that is to have ``shape``."""
    if isinstance(tensor, BytesStorageMetadata):
        return "no tensor"
    properties, shape = (tensor, shape) if isinstance(tensor, Tensor) else (tensor.properties, tensor.size)
    return f"{str(properties.dtype).removeprefix('torch.')}{list(shape)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
