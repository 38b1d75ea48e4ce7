"""Short names for the tensors of sample calls; all floating ones are float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.verification.rule_check import Sample

_GENERATOR = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    """Normally distributed."""
    return torch.randn(shape, dtype=torch.float64, generator=_GENERATOR)


def unit(*shape: int) -> Tensor:
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64, generator=_GENERATOR)


def above(*shape: int) -> Tensor:
    """Between 1.1 and 1.9."""
    return 1.0 + unit(*shape)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_GENERATOR)


def distinct(high: int, count: int) -> Tensor:
    return torch.randperm(high, generator=_GENERATOR)[:count]


def flags(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_GENERATOR) > 0.4


def cplx(*shape: int) -> Tensor:
    return torch.complex(x(*shape), x(*shape))


def call(
    *args: Any, weights: tuple[int, ...] = (), still: tuple[int, ...] = (), outer: int = 1, **kwargs: Any
) -> Sample:
    return Sample(args, kwargs, weights, still, outer)
