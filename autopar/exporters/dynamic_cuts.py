"""A rank's part of a whole, and a whole around a part, where the length is known when the program runs.

The rows are computed from the rank's position, a tensor: one graph serves all ranks and all lengths. As
:func:`autopar.ir.layout.owned_indices`, whose numbers they are at each length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.communication import pieces
from autopar.communication.pieces import grown
from autopar.errors import ExportError
from autopar.ir.layout import Split


def has_symbols(numbers: Sequence[Any]) -> bool:
    """Whether a size that is known when the program runs is among ``numbers``, or in a list among them."""
    return any(
        isinstance(number, torch.SymInt) or (isinstance(number, (list, tuple)) and has_symbols(number))
        for number in numbers
    )


def refuse_symbols(name: str, ratio: Sequence[Any]) -> None:
    """Raise ExportError where the parts that ``name`` joins have segments of other sizes at other lengths."""
    if has_symbols(ratio):
        raise ExportError(
            f"{name} joins parts of unequal segments, whose sizes change with the batch\n"
            "Way out: export a program of fixed sizes (compile_program) for this mesh."
        )


def taken(x: Tensor, position: Tensor, ways: int, dim: int, outer: int, ratio: Sequence[Any], length: Any) -> Tensor:
    """The part of dim ``dim`` (``length`` elements) that ``position`` of ``ways`` has; a short one ends with zeros."""
    rows = _rows(position, ways, outer, ratio, length)
    if outer == 1 and len(ratio) == 1:
        x = grown(x, dim, -(-length // ways) * ways)
    return x.index_select(dim, rows)


def put(x: Tensor, position: Tensor, ways: int, dim: int, outer: int, ratio: Sequence[Any], length: Any) -> Tensor:
    """The inverse of :func:`taken`: zeros of ``length`` elements with ``x`` in its place."""
    own = x.shape[dim]
    rows = _rows(position, ways, outer, ratio, length)
    places = torch.full((own * ways,), own).scatter(0, rows, torch.arange(own))[:length]
    found: Tensor = grown(x, dim, own + 1).index_select(dim, places)
    return found


def _rows(position: Tensor, ways: int, outer: int, ratio: Sequence[Any], length: Any) -> Tensor:
    if outer == 1 and len(ratio) == 1:
        size = -(-length // ways)
        rows: Tensor = torch.arange(size) + position * size
        return rows
    block, found, start = length // abs(outer), [], 0
    segments = _segments(ratio, block)
    for number in range(abs(outer)):
        turn = ways - 1 - position if outer < 0 and number % 2 else position
        for segment in segments:
            part = segment // ways
            found.append(start + turn * part + torch.arange(part))
            start += segment
    return torch.cat(found)


def _segments(ratio: Sequence[Any], block: Any) -> list[Any]:
    """Their sizes, which a ratio with symbols has already."""
    if len(ratio) == 1:
        return [block]
    return list(ratio) if has_symbols(ratio) else [part * (block // sum(ratio)) for part in ratio]


# ---------------------------------------------------------------- the parts of all ranks, in zig-zag order


def apart(whole: Tensor, split: Split, ways: int) -> Tensor:
    """As :func:`autopar.communication.pieces.apart`, which asks for numbers in zig-zag order."""
    if not split.mirrored or isinstance(whole.shape[split.dim], int):
        return pieces.apart(whole, split, ways)
    dim, outer = split.dim, split.outer
    chunks = _unflat(whole, dim, outer * ways)
    parts = [
        torch.cat([chunks.select(dim, block * ways + _turn(block, rank, ways)) for block in range(outer)], dim)
        for rank in range(ways)
    ]
    return torch.stack(parts)


def together(parts: Tensor, split: Split, length: Any) -> Tensor:
    """As :func:`autopar.communication.pieces.together`."""
    if not split.mirrored or isinstance(length, int):
        return pieces.together(parts, split, length)
    dim, outer, ways = split.dim, split.outer, parts.shape[0]
    chunks = _unflat(parts, dim + 1, outer)
    found = [chunks[_turn(block, place, ways)].select(dim, block) for block in range(outer) for place in range(ways)]
    return torch.cat(found, dim)


def _turn(block: int, place: int, ways: int) -> int:
    """The position whose part is at ``place`` in a block, and the other way round."""
    return ways - 1 - place if block % 2 else place


def _unflat(x: Tensor, dim: int, count: int) -> Tensor:
    return torch.unflatten(x, dim, (count, x.shape[dim] // count))
