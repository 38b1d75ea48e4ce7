"""Which tensor of a model each entry of its files is, and what is left over on either side."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autopar.checkpoint.hub_names import Renamed, renamed, without_ignored
from autopar.checkpoint.named_tensors import Named
from autopar.checkpoint.stored_names import Rectangle, stored_names
from autopar.errors import CheckpointError
from autopar.module import held_by

SHOWN = 3  # names of each kind


@dataclass(frozen=True)
class InFiles:
    """The names of a model's tensors in its files.

    Attributes:
        parts: name in the model -> names in files -> what of the tensor they have.
        known: names that lead to a tensor: the model's, tied ones too, and those of ``parts``.
        renaming: a name in files -> one of ``known``, for those that have one.
        computed: names in files of which ``transformers`` would compute tensors.
    """

    parts: Mapping[str, Mapping[str, Rectangle]]
    known: frozenset[str]
    renaming: Mapping[str, str]
    computed: tuple[str, ...]

    def of_model(self, stored: str) -> str:
        return self.renaming.get(stored, stored)


def parts_in_files(model: nn.Module, entries: Sequence[Named]) -> dict[str, dict[str, Rectangle]]:
    """Name of each of ``entries`` -> names in files -> what of it they have."""
    holding = held_by(model)
    outlines = {one.name: torch.empty(one.shape, dtype=one.tensor.dtype, device="meta") for one in entries}
    with holding.weights.traceable():
        return stored_names(holding.model, outlines)


def in_files(
    model: nn.Module, entries: Sequence[Named], stored: Sequence[str], rename: Callable[[str], str] | None
) -> InFiles:
    """The names of ``entries`` in files whose entries are ``stored``; ``rename``: see ``load_safetensors``."""
    parts = parts_in_files(model, entries)
    known = frozenset(name for entry in entries for name in (*entry.names, *parts[entry.name]))
    if rename is not None:
        return InFiles(parts, known, {name: rename(name) for name in stored}, ())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renaming: dict[str, str] = {}
    for name in stored:
        for form in (name, prefix + name, name.removeprefix(prefix)):
            if form in known:
                renaming.setdefault(name, form)
    others = _by_transformers(model, entries, [name for name in stored if name not in renaming])
    return InFiles(parts, known, others.names | renaming, others.computed)


def _by_transformers(model: nn.Module, entries: Sequence[Named], stored: Sequence[str]) -> Renamed:
    if not stored:
        return Renamed({}, ())
    holding = held_by(model)
    with holding.weights.traceable():
        return renamed(holding.model, stored, {name: entry.tensor for entry in entries for name in entry.names})


def refuse_unmatched(
    model: nn.Module, directory: str | Path, missing: Sequence[str], unused: Sequence[str], names: InFiles
) -> None:
    """Raise CheckpointError, which names near ones, unless all tensors have entries, and all entries tensors."""
    holding = held_by(model)
    with holding.weights.traceable():
        lacking, more = without_ignored(holding.model, missing, unused)
    lines = [
        *_told(lacking, more, f"tensors of the model have no entry in the files{_of_head(model, lacking)}"),
        *_told(more, lacking, "entries of the files are no tensors of the model"),
    ]
    if not lines:
        return
    if names.computed:
        lines.append(f"  transformers computes tensors of '{names.computed[0]}' and {len(names.computed) - 1} others.")
        way = "from_pretrained(...).save_pretrained(a new folder, save_original_format=False) of transformers, once"
    else:
        way = "the class that the files belong to; or strict=False, which initialises the first and drops the second"
    kind = type(holding.model).__name__
    raise CheckpointError(f"'{directory}' does not fit {kind}:\n" + "\n".join(lines) + f"\nWay out: {way}.")


def _told(names: Sequence[str], others: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    near = {name: difflib.get_close_matches(name, others[:10_000], 1, 0.8) for name in names[:SHOWN]}
    shown = ", ".join(f"'{name}'" + (f" (near: '{found[0]}')" if found else "") for name, found in near.items())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"  {len(names)} {what}: {shown}{more}"]


def _of_head(model: nn.Module, lacking: Sequence[str]) -> str:
    """A word about a head that files of a base model do not have."""
    prefix = getattr(model, "base_model_prefix", "")
    outside = bool(prefix) and bool(lacking) and not any(name.startswith(f"{prefix}.") for name in lacking)
    return " (they are outside the base model: a new head?)" if outside else ""
