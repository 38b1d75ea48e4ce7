"""How a tensor of some layout is stored on the ranks: as which DTensor.

A part that is contiguous is DTensor's ``Shard(dim)``. The rank's heads of a fused QKV weight are not: they are
:class:`~autopar.dtensors.placements.Pieces`. State dicts have contiguous parts in either case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from autopar.communication.connect import Connection
from autopar.dtensors.piecewise import dtensor, part_of
from autopar.dtensors.placements import owned_positions, pieces, plain
from autopar.errors import IndivisibleError
from autopar.ir.layout import Factor, Layout, shard
from autopar.mesh import Mesh, axes_of


@dataclass(frozen=True)
class Stored:
    """How a tensor of some layout is held: as a DTensor with ``placements``, one for each dim of a DeviceMesh.

    See :attr:`Connection.dims`.
    """

    layout: Layout
    placements: tuple[Placement, ...]


def stored(layout: Layout, mesh: Mesh, dims: Sequence[str], name: str) -> Stored:
    """How ranks hold a tensor of ``layout``; ``dims``: the axis, or merged ones, of each dim of the DeviceMesh.

    Raises IndivisibleError where DTensor has no such uneven parts.
    """
    placements: list[Placement] = [Replicate() for _ in dims]
    for dim, factors in enumerate(layout.dims):
        try:
            owning, order = _dim_form(factors, mesh, tuple(dims))
        except IndivisibleError as problem:
            raise IndivisibleError(f"'{name}' as {layout} on {mesh}: {problem}") from None
        for axis in owning:
            placements[dims.index(axis)] = Shard(dim) if order is None else pieces(dim, order)
    return Stored(layout, tuple(placements))


@lru_cache(maxsize=1024)
def _dim_form(factors: tuple[Factor, ...], mesh: Mesh, dims: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor | None]:
    """The axes that split a dim, and the stored order by which their parts are neighbours (None: the dim's own)."""
    layout = Layout((factors,))
    owning = tuple(axis for axis in dims if layout.axes.intersection(axes_of(axis)))
    ways = [mesh.size(axis) for axis in owning]
    cuts = [part for axis in factors[0].axes for part in ((axis,) if axis in dims else axes_of(axis))]
    even = len(factors) == 1 and tuple(cuts) == owning and factors[0].ratio == (1,) and not factors[0].order
    if not owning or even and (len(owning) == 1 or factors[0].size % math.prod(ways) == 0):
        return owning, None
    places = list(itertools.product(*map(range, ways)))
    found = [layout.indices(0, _coordinates(mesh, owning, place), mesh) for place in places]
    owned = [own for own in found if own is not None]
    given = [owned_positions(layout.shape[0], place, ways) for place in places]
    if all(map(torch.equal, owned, given)):
        return owning, None
    if list(map(len, owned)) != list(map(len, given)):
        raise IndivisibleError(
            f"{layout.shape[0]} elements give the ranks uneven parts; in a DTensor only the last ranks have fewer\n"
            f"Way out: a mesh whose {' x '.join(owning)} divides {layout.shape[0]}."
        )
    return owning, torch.cat(owned)


def _coordinates(mesh: Mesh, axes: Sequence[str], place: Sequence[int]) -> dict[str, int]:
    """The coordinates of the rank at position ``place`` on ``axes``."""
    found: dict[str, int] = {}
    for axis, position in zip(axes, place):
        found |= mesh.place(axis, position)
    return found


def cut(whole: Tensor, form: Stored, connection: Connection) -> DTensor:
    """The DTensor of this rank's part of ``whole`` (model order); a meta tensor stays meta."""
    comm = connection.comm
    local = shard(whole.detach(), form.layout, connection.mesh, comm.coordinates)
    if local.shape != whole.shape or not local.is_contiguous():
        local = local.clone(memory_format=torch.contiguous_format)  # do not keep the whole tensor alive
    return dtensor(local, connection.device_mesh, form.placements, whole.shape)


def is_in_model_order(form: Stored) -> bool:
    """Whether each rank's part is contiguous in the model's own order."""
    return plain(form.placements) == form.placements


def in_model_order(tensor: DTensor, form: Stored) -> DTensor:
    """For state dicts: contiguous parts of the model's order on the same axes; collective where that differs."""
    if is_in_model_order(form):
        return tensor
    return tensor.redistribute(placements=plain(form.placements))


def in_stored_order(value: Tensor, like: DTensor) -> DTensor:
    """From a state dict: a whole tensor, or a DTensor of any placements, as ``like`` is held."""
    if isinstance(value, DTensor) and value.device_mesh == like.device_mesh:
        return value.redistribute(placements=like.placements)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return part_of(whole.to(like.device), like)
