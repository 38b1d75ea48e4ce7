"""A model called with a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.data.batch_source import Batch, Counts
from autopar.ir.loss import loss_of


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional arguments of a call, and those by name."""
    return ((), batch) if isinstance(batch, dict) else (batch, {})


def moved(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``."""
    found: Batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    return found


def loss_after(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that ``model`` returns for a batch. Raises InvariantError where it returns none."""
    args, kwargs = arguments(batch)
    return loss_of(model(*args, **kwargs))


def total(counts: Iterable[Counts]) -> Counts:
    """Of several batches; their tokens where all have some."""
    rows, tokens = zip(*counts)
    known = [number for number in tokens if number is not None]
    return Counts(sum(rows), sum(known) if len(known) == len(tokens) else None)
