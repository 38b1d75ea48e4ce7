"""Parameters of the model that a program takes as one: ``experts.*.up.weight`` (E, ...) for those of E experts.

The name has ``*`` in place of the number, which goes from 0 to E - 1. Whatever has, or wants, tensors under the names
of the model passes them through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STAR = "*"


def stacked_name(names: Sequence[str]) -> str | None:
    """The name for all of ``names``, which differ in one number that counts them; None where they do not."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({len(part) for part in parts}) != 1:
        return None
    differing = [place for place, column in enumerate(zip(*parts)) if len(set(column)) > 1]
    if len(differing) != 1 or [part[differing[0]] for part in parts] != [str(i) for i in range(len(parts))]:
        return None
    (place,) = differing
    return ".".join([*parts[0][:place], STAR, *parts[0][place + 1 :]])


def is_stacked(name: str) -> bool:
    return STAR in name.split(".")


def member_names(name: str, count: int) -> tuple[str, ...]:
    """The names of the model for which ``name`` stands, in their order."""
    before, _, after = (f".{name}.").partition(f".{STAR}.")
    return tuple(f"{before}.{number}.{after}".strip(".") for number in range(count))


def names_of_stacks(name: str) -> list[str]:
    """The names of the stacks of which the model's ``name`` could be a member."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdecimal()]
    return [".".join([*parts[:place], STAR, *parts[place + 1 :]]) for place in places]


def stacked(name: str, count: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor (count, ...) called ``name``, from those of the model; None where they are not given."""
    members = member_names(name, count)
    return torch.stack([tensors[member] for member in members]) if members[0] in tensors else None


def by_member(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the model: of each stack copies of its parts."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_stacked(name):
            found.update(zip(member_names(name, len(tensor)), map(Tensor.clone, tensor.unbind())))
        else:
            found[name] = tensor
    return found
