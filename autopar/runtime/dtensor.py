"""The one door to the private parts of DTensor, for the sake of speed.

``DTensor.from_local`` and ``to_local`` go through autograd and cost 10 to 50 us a call; a step needs two per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

HELD = "autopar_held"  # on a parameter of a parallel module: how it is held

_new: Any = torch.Tensor._dtensor__new__  # type: ignore[attr-defined]


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without autograd; any other tensor is its own part."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def keep_within(tensor: Tensor, place: Tensor) -> None:
    """Make ``place``, which holds the same numbers, the memory of this rank's part of ``tensor``."""
    assert isinstance(tensor, DTensor) and place.shape == tensor._local_tensor.shape
    tensor._local_tensor = place


def is_first(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same part of ``tensor``."""
    here: Sequence[int] = tensor._spec.mesh.get_coordinate() or ()
    return not any(at for at, placement in zip(here, tensor._spec.placements) if placement.is_replicate())


def spec_of(tensor: DTensor) -> Any:
    """Everything about ``tensor`` but its data; see :func:`of_local`."""
    return tensor._spec


def of_local(local: Tensor, spec: Any) -> DTensor:
    """The DTensor of ``local`` with the shape, mesh and placements of ``spec``; nothing is checked or copied."""
    tensor: DTensor = _new(DTensor, local, spec, requires_grad=False)
    return tensor


def dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """The DTensor of global ``shape`` of which ``local`` is this rank's part; no communication, no copy."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    with torch.no_grad():
        return DTensor.from_local(
            local, mesh, list(placements), run_check=False, shape=torch.Size(shape), stride=stride
        )


def strided(dim: int, blocks: int) -> Placement:
    """Dim ``dim`` is cut into ``blocks``, and each block is divided over the axis: ``Shard(dim)`` for one block."""
    return Shard(dim) if blocks == 1 else _StridedShard(dim, split_factor=blocks)


def blocks_of(placement: Placement, dim: int) -> int | None:
    """The inverse of :func:`strided`; None where ``placement`` does not split dim ``dim``."""
    if isinstance(placement, _StridedShard):
        return int(placement.split_factor) if placement.dim == dim else None
    return 1 if isinstance(placement, Shard) and placement.dim == dim else None


def contiguous(placement: Placement) -> Placement:
    """``Shard`` of the same dim in place of a strided one."""
    return Shard(placement.dim) if isinstance(placement, _StridedShard) else placement
