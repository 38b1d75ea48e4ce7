"""Modules that a model has in plain lists, tuples or dicts, where torch does not see their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autopar.notes import warn


def note_hidden_modules(model: nn.Module) -> None:
    """Warn of the first attribute whose modules have parameters that ``model.parameters()`` lacks, as torch trains it.

    Such parameters are neither trained nor saved, nor moved to a device. What needs no gradients is meant to be hidden.
    """
    known: set[int] = set()
    for owner, module in model.named_modules():
        for attribute, held in vars(module).items():
            if attribute.startswith("_") or next(_modules(held), None) is None:
                continue
            known = known or {id(parameter) for parameter in model.parameters()}
            lost = [
                entry for entry in _modules(held)
                if any(own.requires_grad and id(own) not in known for own in entry.parameters())
            ]  # fmt: skip
            if lost:
                where = f"{owner}.{attribute}" if owner else attribute
                better = "nn.ModuleDict" if isinstance(held, Mapping) else "nn.ModuleList"
                warn(
                    f"'{where}' is a plain {type(held).__name__} with {len(lost)} modules ({type(lost[0]).__name__}), "
                    f"whose parameters torch does not know: they are not trained and not saved; {better} is for that",
                    stacklevel=3,
                )
                return


def _modules(held: Any) -> Iterator[nn.Module]:
    """The modules in a plain collection. Those that are registered elsewhere in the model too are among them."""
    entries = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    yield from (entry for entry in entries if isinstance(entry, nn.Module))
