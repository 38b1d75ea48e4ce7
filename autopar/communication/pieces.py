"""The pieces of a tensor on one axis: cut one out, put all side by side for a collective along dim 0, join them again.

The results are contiguous, as the shape functions in :mod:`autopar.ir.collectives` promise. Nothing is copied for a
plain split of dim 0. The simulator cuts and joins by index in code of its own (:mod:`autopar.simulator.lockstep`), on
purpose: this file is tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from autopar.ir.layout import Split, owned_indices, runs


def take(whole: Tensor, split: Split, position: int, ways: int) -> Tensor:
    """The part of ``position`` of ``ways``; a short one is padded with zeros to ceil(length / ways)."""
    dim, length = split.dim, whole.shape[split.dim]
    if not split.contiguous:
        return whole.index_select(dim, owned_indices(length, split, position, ways).to(whole.device))
    size = -(-length // ways)
    start = min(position * size, length)
    return grown(whole.narrow(dim, start, min(size, length - start)), dim, size).contiguous()


def put(part: Tensor, split: Split, position: int, ways: int, length: int) -> Tensor:
    """The inverse of :func:`take`: zeros of ``length`` elements with ``part`` in its place, its padding dropped."""
    dim = split.dim
    whole = part.new_zeros([length if d == dim else size for d, size in enumerate(part.shape)])
    if not split.contiguous:
        return whole.index_copy_(dim, owned_indices(length, split, position, ways).to(part.device), part)
    start = min(position * part.shape[dim], length)
    count = min(part.shape[dim], length - start)
    whole.narrow(dim, start, count).copy_(part.narrow(dim, 0, count))
    return whole


def apart(whole: Tensor, split: Split, ways: int) -> Tensor:
    """The parts of all positions, side by side: (ways, *shape of a part)."""
    dim, length = split.dim, whole.shape[split.dim]
    if split.contiguous:
        size = -(-length // ways)
        return _unflat(grown(whole, dim, size * ways), dim, ways, size).movedim(dim, 0).contiguous()
    if split.mirrored:
        return torch.stack([take(whole, split, position, ways) for position in range(ways)])
    blocks = _unflat(whole, dim, split.outer, -1)
    unit = blocks.shape[dim + 1] // sum(split.ratio)
    segments = torch.split(blocks, [share * unit for share in split.ratio], dim + 1)
    moved = [_unflat(segment, dim + 1, ways, -1).movedim(dim + 1, 0) for segment in segments]
    return torch.cat(moved, dim + 2).flatten(dim + 1, dim + 2)


def together(parts: Tensor, split: Split, length: int) -> Tensor:
    """The inverse of :func:`apart`; padding of an uneven split is dropped."""
    dim, ways = split.dim, parts.shape[0]
    if split.contiguous:
        return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length).contiguous()
    if split.mirrored:
        owned = torch.cat([owned_indices(length, split, position, ways) for position in range(ways)])
        return parts.movedim(0, dim).flatten(dim, dim + 1).index_select(dim, owned.argsort().to(parts.device))
    unit = length // split.outer // sum(split.ratio) // ways
    blocks = _unflat(parts, dim + 1, split.outer, -1)
    segments = torch.split(blocks, [share * unit for share in split.ratio], dim + 2)
    moved = [segment.movedim(0, dim + 1).flatten(dim + 1, dim + 2) for segment in segments]
    return torch.cat(moved, dim + 1).flatten(dim, dim + 1)  # of what cat made: contiguous


@dataclass(frozen=True)
class Crossing:
    """The part of one rank in equal blocks of ``size`` elements, as they go to other ranks.

    ``order``: the numbers of its blocks by receiver; ``counts``: how many each receiver gets.
    """

    size: int
    order: tuple[int, ...]
    counts: tuple[int, ...]


@lru_cache(maxsize=256)
def crossing(source: Split, target: Split, length: int, position: int, ways: int) -> Crossing:
    """Where the blocks of ``position``'s part by ``source`` are by ``target``, a split of the same dim.

    That of ``target`` to ``source`` is what the rank receives: two ranks see the blocks between them in one order,
    that of the whole. Raises ValueError for a split that does not divide.
    """
    owned = [[owned_indices(length, split, rank, ways) for rank in range(ways)] for split in (source, target)]
    size = math.gcd(*(number for parts in owned for part in parts for run in runs(part) for number in run))
    before, after = [[part[::size] // size for part in parts] for parts in owned]
    receiver = torch.cat([torch.full_like(part, rank) for rank, part in enumerate(after)])
    receivers = receiver[torch.cat(after).argsort()][before[position]]
    order = torch.argsort(receivers * (length // size) + before[position])
    counts = receivers.bincount(minlength=ways)
    return Crossing(size, tuple(order.tolist()), tuple(counts.tolist()))


def grown(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros appended along ``dim`` up to ``size`` elements; ``x`` itself where it has them."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    return torch.cat([x, x.new_zeros([missing if d == dim else have for d, have in enumerate(x.shape)])], dim)


def padded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x`` with zeros appended to ``shape``; ``x`` itself where it has it."""
    if x.shape != shape:
        for dim, size in enumerate(shape):
            x = grown(x, dim, size)
    return x


def _unflat(x: Tensor, dim: int, *sizes: int) -> Tensor:
    return torch.unflatten(x, dim, sizes)
