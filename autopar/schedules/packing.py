"""Several small values of one message in one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Types = Sequence[tuple[tuple[int, ...], "torch.dtype"]]
MOST_TOGETHER = 1 << 20  # bytes: what is larger is not worth a copy


def together(types: Types) -> list[list[int]]:
    """Which values of a message travel in one piece: small ones of one dtype."""
    found: list[list[int]] = []
    open_pieces: dict[torch.dtype, list[int]] = {}
    for position, (shape, dtype) in enumerate(types):
        if math.prod(shape) * dtype.itemsize > MOST_TOGETHER:
            found.append([position])
        elif dtype in open_pieces:
            open_pieces[dtype].append(position)
        else:
            open_pieces[dtype] = [position]
            found.append(open_pieces[dtype])
    return found
