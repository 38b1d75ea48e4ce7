"""How DTensors along one dim of a DeviceMesh have their parts, where torch's own placements cannot say it.

A rank's part of a fused QKV weight is its rows of Q, of K and of V, which are no neighbours; torch's ``Shard`` means
neighbours. (Its ``_StridedShard`` says equal blocks; torch's distributed checkpoints then write them as neighbours.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from autopar.ir.layout import runs


class Pieces(Placement):
    """As ``Shard(dim)`` of a tensor whose indices along ``dim`` are in another order.

    ``runs``: (first index in the whole, length) of each run of neighbours, in the other order. All dims of a DeviceMesh
    that split one dim have the same. It is no ``Shard`` to torch, so that code of torch which does not know it stops.
    """

    def __init__(self, dim: int, runs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.dim, self.runs = dim, tuple(runs)

    @property
    def order(self) -> Tensor:
        """For each stored position its index in the whole (int64, 1-D)."""
        return _indices(self.runs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and (self.dim, self.runs) == (other.dim, other.runs)

    def __hash__(self) -> int:
        return hash((self.dim, self.runs))

    def __repr__(self) -> str:
        first = ", ".join(f"{start}..{start + length - 1}" for start, length in self.runs[:4])
        return f"Pieces(dim={self.dim}, {first}{', ...' if len(self.runs) > 4 else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Pieces, (self.dim, self.runs)


def pieces(dim: int, order: Tensor) -> Pieces:
    """The placement of parts of ``order``; see :attr:`Pieces.order`."""
    return Pieces(dim, runs(order))


def plain(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements of the tensor in the stored order: ``Shard`` in place of ``Pieces``."""
    return tuple([Shard(one.dim) if isinstance(one, Pieces) else one for one in placements])


def orders(placements: Sequence[Placement]) -> dict[int, Tensor]:
    """For each dim that is not in the order of the whole: its stored order."""
    return {one.dim: one.order for one in placements if isinstance(one, Pieces)}


def owned_positions(size: int, place: Sequence[int], ways: Sequence[int]) -> Tensor:
    """The indices that ``Shard`` gives to ``place``: each axis cuts the indices that the ones before it left."""
    own = torch.arange(size)
    for position, way in zip(place, ways):
        part = max(1, -(-len(own) // way))
        own = own[position * part : (position + 1) * part]
    return own


@lru_cache(maxsize=1024)
def _indices(found: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([torch.arange(first, first + length) for first, length in found])
