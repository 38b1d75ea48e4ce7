"""``autopar.gather``: the plain model, with all of its weights, in one process or in all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopar.checkpoint.initialise import copy_on_meta
from autopar.errors import CheckpointError
from autopar.module import held_by
from autopar.weights.plain_copies import fill, forget_our_hooks
from autopar.weights.whole_tensors import full_state_dict


def gather(model: nn.Module, rank: int | None = 0, *, device: torch.device | str = "cpu") -> nn.Module | None:
    """A copy of the unmodified model, with whole weights, on ``rank``; None on the others. ``rank=None``: on all.

    It has all methods of the model's class: ``generate``, ``save_pretrained``, ``push_to_hub``. Nothing is shared: the
    parallel model goes on, and the copy stays as it is. Collective, one tensor after the other; ranks that do not get
    the copy have no more memory in use than for one tensor. They wait at the next collective for those that do, at most
    ``Plan(timeout=)`` seconds.

    Raises CheckpointError for a rank that there is not.
    """
    holding = held_by(model)
    connection = holding.weights.connection
    ranks = connection.mesh.world_size if connection else 1
    if rank is not None and not 0 <= rank < ranks:
        raise CheckpointError(f"gather(rank={rank}): there are ranks 0 to {ranks - 1}, and None for all")
    root = holding.weights.root
    held: dict[str, Any] = dict(root.named_buffers(remove_duplicate=False))  # also those that no state dict has
    held.update(root.named_parameters(remove_duplicate=False))
    wholes = full_state_dict(holding.weights, held, str(device), rank)
    if not wholes:
        return None
    plain = copy_on_meta(model)
    forget_our_hooks(plain)
    fill(plain, wholes)
    return plain
