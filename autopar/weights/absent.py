"""Tensors of a model that other pipeline stages hold, and this rank does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Table = dict[str, Any]  # the parameters, or the buffers, of one module


@dataclass(frozen=True)
class Absent:
    """A parameter or buffer that only other pipeline stages hold; ``outline`` is a meta tensor like it.

    ``emptied``: the parameter itself, now empty, which an optimizer made before the cut still has.
    """

    table: Table
    key: str
    name: str
    outline: Tensor
    emptied: Tensor | None


def outline(tensor: Tensor) -> Tensor:
    """A meta tensor like ``tensor``, a parameter if it is one."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
