"""Rounding errors made visible: every operator's result is rounded up, down or not at all, at random.

This is Monte Carlo arithmetic (Parker 1997), operator by operator: what differs between two such runs is what rounding
may change, in any order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class RoundedOtherwise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, float64 results of operators move by a unit of their last digit, forward and backward."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if _gives_new_memory(func):
            for tensor in pytree.tree_leaves(found):
                if isinstance(tensor, Tensor) and tensor.dtype is torch.float64 and not tensor.is_sparse:
                    self._move(tensor)
        return found

    def _move(self, tensor: Tensor) -> None:
        ways = torch.randint(-1, 2, tensor.shape, generator=self._generator, dtype=torch.int8).to(tensor.device)
        tensor.addcmul_(tensor, ways, value=torch.finfo(torch.float64).eps)


def _gives_new_memory(func: Any) -> bool:
    return not any(returned.alias_info is not None for returned in func._schema.returns)
