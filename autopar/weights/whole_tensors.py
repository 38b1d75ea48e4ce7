"""Whole tensors under the model's names, gathered from the ranks that hold their parts, pipeline stages included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.communication.connect import Connection
from autopar.dtensors.dtensor import full_of
from autopar.mesh import PIPELINE
from autopar.weights.parameters import Weights


def full_state_dict(weights: Weights, held: Mapping[str, Any], device: str, rank: int | None) -> dict[str, Tensor]:
    """Copies on ``device`` of the whole tensors of a state dict, of which this rank has ``held``.

    Collective, one tensor after the other. Empty except on ``rank``, which is None for all.
    """
    connection = weights.connection
    keeps = connection is None or rank is None or connection.rank == rank
    outlines = _outlines(weights)
    is_pipelined = connection is not None and connection.mesh.is_pipelined
    names = list(_holders(weights, held) if is_pipelined else held)
    found: dict[str, Tensor] = {}
    for name in names:
        tensor = held.get(name)
        gathered = isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements)
        whole = _over_stages(connection, full_of(tensor), weights.first.get(name), outlines.get(name))
        if keeps:
            found[name] = whole.detach().to(device, copy=not gathered)
    return weights.of_model(found)


def full_grads(weights: Weights, grads: Mapping[str, Tensor], first: Mapping[str, int]) -> dict[str, Tensor]:
    """The whole gradients, of which this rank has ``grads``, by parameter name; collective.

    On a pipeline, ``first`` has the first pipeline rank that uses each parameter.
    """
    outlines = _outlines(weights)
    holders = _holders(weights, grads) if first else dict.fromkeys(grads)
    wholes = {name: full_of(grad) for name, grad in grads.items()}
    found = {
        name: _over_stages(weights.connection, wholes.get(name), first.get(name, holder), outlines.get(name))
        for name, holder in holders.items()
    }
    return weights.of_model(found)


def _holders(weights: Weights, held: Mapping[str, Any]) -> dict[str, int]:
    """The names that any rank has, in one order, each with the first pipeline rank that has it; collective.

    Stages differ in what they have: frozen ones have no gradients, and buffers may be in no state dict.
    """
    if weights.connection is None:
        return dict.fromkeys(held, 0)
    everyone, known = weights.connection.comm.agreement.everyone(list(held)), {*held, *_outlines(weights)}
    mesh, found = weights.connection.mesh, dict[str, int]()
    for rank, names in enumerate(everyone):
        stage = mesh.coordinates(rank)[PIPELINE]
        found |= {name: min(stage, found.get(name, stage)) for name in names if name in known}
    return dict(sorted(found.items()))


def _outlines(weights: Weights) -> dict[str, Tensor]:
    """Outlines of the tensors that only other pipeline stages hold, by name."""
    return {missing.name: missing.outline for missing in weights.absent}


def _over_stages(
    connection: Connection | None, whole: Tensor | None, first: int | None, outline: Tensor | None
) -> Tensor:
    """On all ranks, the tensor of pipeline rank ``first``; without such a rank, all have it already."""
    if connection is None or first is None:
        assert whole is not None
        return whole
    comm = connection.comm
    if whole is None or first != comm.coordinates[PIPELINE]:
        like = outline if whole is None else whole
        assert like is not None
        whole = torch.zeros(like.shape, dtype=like.dtype, device=comm.device)
    return comm.all_reduce(whole, PIPELINE)
