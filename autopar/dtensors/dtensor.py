"""The one door to the private parts of DTensor, for the sake of speed.

``DTensor.from_local`` and ``to_local`` go through autograd and cost 10 to 50 us a call; a step needs two per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HELD = "autopar_held"  # on a parameter of a parallel module: how it is held

new_dtensor: Any = torch.Tensor._dtensor__new__  # type: ignore[attr-defined]  # see :func:`of_local`


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without autograd; any other tensor is its own part."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def locals_of(places: Sequence[tuple[Mapping[str, Any], str]]) -> list[Tensor]:
    """:func:`local_of` of what is held in tables, each by its key."""
    try:
        return [table[key]._local_tensor for table, key in places]
    except AttributeError:  # not all are DTensors
        return [local_of(table[key]) for table, key in places]


def full_of(tensor: Any) -> Any:
    """All of a DTensor, differentiable; collective where it is in parts. Anything else is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    tensor: DTensor = new_dtensor(kind_of_spec(spec), local, spec, requires_grad=False)
    return tensor


def parameter_of(made: DTensor, requires_grad: bool) -> nn.Parameter:
    """``made``, which nobody else has, as a parameter.

    ``nn.Parameter(made)`` marks ``made.detach()`` so: DTensor's dispatch takes 5 ms for the first tensor of each shape.
    """
    found: Any = made.requires_grad_(requires_grad)
    found._is_param = True
    parameter: nn.Parameter = found
    return parameter


def kind_of_spec(spec: Any) -> Any:
    """The class of DTensors with ``spec``."""
    return getattr(spec, "kind", DTensor)
