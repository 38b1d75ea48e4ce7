"""Constants of a family: those that are equal everywhere, and those that are the beginning of a longer one.

Positions, rotary tables and masks of n positions begin those of more positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.families.forms import NoForm, Terms


@dataclass(frozen=True)
class Beginning:
    """The constant of a member: the part of ``longest`` that begins at 0 in each dim, of ``shape`` (expressions)."""

    longest: Tensor
    shape: tuple[Any, ...]

    def of(self, sizes: dict[Any, Any]) -> Tensor:
        shape = tuple(sizes.get(size, size) for size in self.shape)
        if shape == tuple(self.longest.shape):
            return self.longest
        found = self.longest
        for dim, size in enumerate(shape):
            found = found.narrow(dim, 0, size)
        return found.contiguous()

    def joined(self, other: Tensor, place: str) -> Beginning:
        """This one, where the constant is ``other`` at another point. Raises NoForm where neither begins the other."""
        return Beginning(_longest(place, [self.longest, other]), self.shape)


def beginning(place: str, tensors: Sequence[Tensor], terms: Terms) -> Beginning:
    """How the constant that was ``tensors`` at the points of a family is made. Raises NoForm."""
    if len({tensor.dim() for tensor in tensors}) > 1:
        raise NoForm(f"the constant '{place}' has another number of dims")
    shape = tuple(terms.form(sizes) for sizes in zip(*(tensor.shape for tensor in tensors)))
    return Beginning(_longest(place, tensors), shape)


def _longest(place: str, tensors: Sequence[Tensor]) -> Tensor:
    """The one of which all others are beginnings. Raises NoForm."""
    longest = max(tensors, key=Tensor.numel)
    for tensor in tensors:
        if any(size > most for size, most in zip(tensor.shape, longest.shape)):
            raise NoForm(f"the constant '{place}' is longer in one dim and shorter in another")
        part = longest
        for dim, size in enumerate(tensor.shape):
            part = part.narrow(dim, 0, size)
        if not torch.equal(_bits(part), _bits(tensor)):
            raise NoForm(f"the constant '{place}' has other values at other sizes")
    return longest


def _bits(tensor: Tensor) -> Tensor:
    """``tensor`` so that nan equals nan."""
    if not tensor.is_floating_point():
        return tensor
    return torch.nan_to_num(tensor, nan=torch.finfo(tensor.dtype).max * 0.75)
