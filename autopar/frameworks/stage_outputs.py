"""Outputs of a pipeline on all ranks: of itself those other than the loss are on the ranks of their stages alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


def on_all_ranks(outputs: Any, device: torch.device | str) -> Any:
    """``outputs`` with whole tensors in place of the Nones of ranks that do not make them; collective."""
    is_record = dataclasses.is_dataclass(outputs) and not isinstance(outputs, type)
    given = {one.name: getattr(outputs, one.name) for one in dataclasses.fields(outputs)} if is_record else outputs
    leaves, spec = pytree.tree_flatten(given)
    found = pytree.tree_unflatten(_sent([_whole(leaf) for leaf in leaves], device), spec)
    return type(outputs)(**found) if is_record else found


def _whole(leaf: Any) -> Any:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def _sent(leaves: Sequence[Any], device: torch.device | str) -> list[Any]:
    kinds = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, kinds)
    found = list(leaves)
    for place, of_leaf in enumerate(zip(*of_ranks)):
        makers = [rank for rank, kind in enumerate(of_leaf) if kind is not None]
        if not makers or len(makers) == len(of_ranks):
            continue
        shape, dtype = of_leaf[makers[0]]
        mine = leaves[place]
        found[place] = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine.detach().contiguous()
        dist.broadcast(found[place], makers[0])
    return found
