"""A tensor by what an operator looks at: its type, sizes, strides, and whose memory it is. It has no elements.

Torch's own fake tensors say the same, at a hundred times the price: they pass through its dispatcher.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch


@dataclass(eq=False, slots=True)
class Outline:
    """``memory``: a number that all views of one tensor share; ``offset``: where in it this one begins, in elements."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    memory: int
    offset: int = 0
    requires_grad: bool = False
    kind: tuple[torch.dtype, torch.Size, tuple[int, ...]] = field(init=False)  # what the result of an operator follows

    def __post_init__(self) -> None:
        self.kind = (self.dtype, self.shape, self.strides)

    def is_contiguous(self) -> bool:
        if 0 in self.shape:
            return True
        wanted = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != wanted:
                return False
            wanted *= size
        return True


@functools.lru_cache(maxsize=4096)
def strides_of_view(
    shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The strides of a view of sizes ``wanted``; None where torch would have to copy."""
    try:
        return torch.empty_strided(shape, strides, device="meta").view(wanted).stride()
    except RuntimeError:
        return None
