"""How a tensor of some layout is stored on the ranks: as which DTensor, and in which order along its dims.

A part that is contiguous is DTensor's ``Shard(dim)``. The rank's heads of a fused QKV weight are not: three equal parts
are a strided shard, others (grouped-query heads) are stored as ``Shard(dim)`` of a *permuted* tensor. State dicts have
contiguous parts of the model's own order in either case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from autopar.errors import IndivisibleError
from autopar.ir.layout import Factor, Layout, runs, shard
from autopar.mesh import Mesh, axes_of
from autopar.runtime.connect import Connection
from autopar.runtime.dtensor import contiguous, dtensor, strided


@dataclass(frozen=True)
class Stored:
    """How a tensor of some layout is held: as DTensor ``placements`` of a tensor permuted along some dims.

    There is one placement for each dim of a DeviceMesh, see :attr:`Connection.dims`.

    ``orders``: dim -> for each stored position its index in the model's own order.
    """

    layout: Layout
    placements: tuple[Placement, ...]
    orders: tuple[tuple[int, Tensor], ...] = ()

    def to_model(self, whole: Tensor) -> Tensor:
        for dim, order in self.orders:
            whole = whole.index_select(dim, order.argsort().to(whole.device))
        return whole

    def to_stored(self, whole: Tensor) -> Tensor:
        for dim, order in self.orders:
            whole = whole.index_select(dim, order.to(whole.device))
        return whole


def stored(layout: Layout, mesh: Mesh, dims: Sequence[str], name: str) -> Stored:
    """How ranks hold a tensor of ``layout``; ``dims``: the axis, or merged ones, of each dim of the DeviceMesh.

    Raises IndivisibleError where DTensor has no such uneven parts.
    """
    placements: list[Placement] = [Replicate() for _ in dims]
    orders: list[tuple[int, Tensor]] = []
    for dim, factors in enumerate(layout.dims):
        try:
            blocks, order = _dim_form(factors, mesh, tuple(dims))
        except IndivisibleError as problem:
            raise IndivisibleError(f"'{name}' as {layout} on {mesh}: {problem}") from None
        for axis, count in blocks:
            placements[dims.index(axis)] = strided(dim, count)
        if order is not None:
            orders.append((dim, order))
    return Stored(layout, tuple(placements), tuple(orders))


@lru_cache(maxsize=1024)
def _dim_form(
    factors: tuple[Factor, ...], mesh: Mesh, dims: tuple[str, ...]
) -> tuple[tuple[tuple[str, int], ...], Tensor | None]:
    """(axis, blocks) of the placements that give every rank its part of a dim, and the stored order (None: its own)."""
    layout = Layout((factors,))
    owning = [axis for axis in dims if layout.axes.intersection(axes_of(axis))]
    ways = [mesh.size(axis) for axis in owning]
    cuts = [part for axis in factors[0].axes for part in ((axis,) if axis in dims else axes_of(axis))]
    plain = len(factors) == 1 and cuts == owning and factors[0].ratio == (1,) and not factors[0].order
    if not owning or plain and (len(owning) == 1 or factors[0].size % math.prod(ways) == 0):
        return tuple((axis, 1) for axis in owning), None
    places = list(itertools.product(*map(range, ways)))
    found = [layout.indices(0, _coordinates(mesh, owning, place), mesh) for place in places]
    owned = [own for own in found if own is not None]
    pieces = max(1, len(runs(owned[0])))
    counts = {1, pieces, *ways, *(pieces * way for way in ways)}
    for blocks in itertools.product(sorted(counts), repeat=len(owning)):
        given = [owned_positions(layout.shape[0], place, ways, blocks) for place in places]
        if all(map(torch.equal, owned, given)):
            return tuple(zip(owning, blocks)), None
    one = [1] * len(owning)
    if [len(own) for own in owned] != [len(owned_positions(layout.shape[0], place, ways, one)) for place in places]:
        raise IndivisibleError(
            f"{layout.shape[0]} elements give the ranks uneven parts; in a DTensor only the last ranks have fewer\n"
            f"Way out: a mesh whose {' x '.join(owning)} divides {layout.shape[0]}."
        )
    return tuple((axis, 1) for axis in owning), torch.cat(owned)


def _coordinates(mesh: Mesh, axes: Sequence[str], place: Sequence[int]) -> dict[str, int]:
    """The coordinates of the rank at position ``place`` on ``axes``."""
    found: dict[str, int] = {}
    for axis, position in zip(axes, place):
        found |= mesh.place(axis, position)
    return found


def owned_positions(size: int, place: Sequence[int], ways: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The indices that DTensor gives to ``place``: each axis cuts the indices that the ones before it left."""
    own = torch.arange(size)
    for position, way, count in zip(place, ways, blocks):
        pieces = own.split(max(1, -(-len(own) // (way * count))))  # type: ignore[no-untyped-call]
        own = torch.cat([own[:0], *pieces[position::way]])
    return own


def cut(whole: Tensor, form: Stored, connection: Connection) -> DTensor:
    """The DTensor of this rank's part of ``whole`` (model order); a meta tensor stays meta."""
    comm = connection.comm
    local = shard(whole.detach(), form.layout, connection.mesh, comm.coordinates)
    if local.shape != whole.shape or not local.is_contiguous():
        local = local.clone(memory_format=torch.contiguous_format)  # do not keep the whole tensor alive
    return dtensor(local, connection.device_mesh, form.placements, whole.shape)


def is_in_model_order(form: Stored) -> bool:
    """Whether each rank's part is contiguous in the model's own order."""
    return not form.orders and tuple(map(contiguous, form.placements)) == form.placements


def in_model_order(tensor: DTensor, form: Stored) -> DTensor:
    """For state dicts: contiguous parts of the model's order on the same axes; collective where that differs."""
    if is_in_model_order(form):
        return tensor
    placements = tuple(map(contiguous, form.placements))
    whole = form.to_model(tensor.full_tensor())
    return distribute_tensor(whole, tensor.device_mesh, placements, src_data_rank=None)


def in_stored_order(value: Tensor, like: DTensor, form: Stored) -> DTensor:
    """From a state dict: a whole tensor, or a DTensor of the model's order on any placements, as ``like`` is held."""
    if isinstance(value, DTensor) and not form.orders and value.device_mesh == like.device_mesh:
        return value.redistribute(placements=like.placements)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = form.to_stored(whole.to(like.device))
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
