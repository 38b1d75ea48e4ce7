"""The one door to what torch keeps private of autograd, for the sake of speed and memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_runs: Any = torch._C._will_engine_execute_node  # type: ignore[attr-defined]


def below_autograd() -> AbstractContextManager[Any]:
    """Operators go past autograd, which has nothing to do in a rank program: 0.3 us less for each."""
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def take_saved(backward: Any) -> list[Tensor]:
    """The saved tensors of an ``autograd.Function`` context, which lets go of them unless the graph is retained."""
    saved = list(backward.saved_tensors)
    backward.maybe_clear_saved_tensors()
    return saved


def accumulating(backward: Any) -> list[bool]:
    """For each tensor that an ``autograd.Function`` took: whether this pass adds its gradient to ``.grad`` (of a leaf).

    False for all under ``torch.autograd.grad``, which wants the gradients themselves.
    """
    try:
        return [node is not None and _runs(node) for node, _ in backward.next_functions]
    except RuntimeError:
        return [False] * len(backward.next_functions)


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody has hooks on the gradient of ``tensor``."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
