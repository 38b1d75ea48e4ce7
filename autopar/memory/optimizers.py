"""The bytes of the states that an optimizer keeps for a parameter, as torch's own hold them after their first step.

``adam8bit`` is that of torchao: one byte an element, a float32 scale for each 256, and a table of 256 float32 a state;
small tensors (below 4096 elements, or no multiple of 256) are as AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Count = Callable[[Sequence[int], torch.dtype], int]

COUNTER = torch.float32.itemsize  # "step", a tensor of one number for each parameter
BLOCK, SMALL, CODES = 256, 4096, 256


@dataclass(frozen=True)
class Optimizer:
    """``states``: bytes that it keeps for a parameter of a shape and dtype; ``does``: what they are.

    ``whole_only``: torch has no step of it for parameters that are split over ranks, so that the runtime refuses it.
    """

    states: Count
    does: str
    whole_only: bool = False


def _alike(copies: int, counts: bool = True) -> Count:
    """``copies`` tensors as large as the parameter."""
    return lambda shape, dtype: copies * math.prod(shape) * dtype.itemsize + COUNTER * counts


def _factored(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Sums along rows and along columns (Shazeer and Stern 2018); of vectors one number for each element."""
    if len(shape) < 2:
        return math.prod(shape) * dtype.itemsize + COUNTER
    rest = math.prod(shape[:-2])
    return rest * (shape[-2] + shape[-1]) * dtype.itemsize + COUNTER


def _in_8_bits(shape: Sequence[int], dtype: torch.dtype) -> int:
    elements = math.prod(shape)
    if elements < SMALL or elements % BLOCK:
        return _alike(2)(shape, dtype)
    return 2 * (elements + (elements // BLOCK + CODES) * torch.float32.itemsize) + COUNTER


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_alike(2), "two moments"),
    "adam": Optimizer(_alike(2), "two moments"),
    "adam-amsgrad": Optimizer(_alike(3), "two moments, and the largest second one"),
    "adam8bit": Optimizer(_in_8_bits, "two moments of a byte an element, with scales (torchao)"),
    "adafactor": Optimizer(_factored, "second moments of rows and columns", whole_only=True),
    "adagrad": Optimizer(_alike(1), "the sum of squares"),
    "rmsprop": Optimizer(_alike(1), "the mean of squares"),
    "sgd": Optimizer(_alike(0, counts=False), "nothing"),
    "sgd-momentum": Optimizer(_alike(1, counts=False), "momentum"),
}


def optimizer_named(name: str) -> Optimizer:
    """Raises ValueError, with those that there are."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer '{name}' is not known; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def refuse_split(name: str, split: str) -> None:
    """Raise ValueError if the optimizer ``name`` cannot update ``split``, which is split over ranks."""
    if optimizer_named(name).whole_only:
        raise ValueError(
            f"torch's {name} cannot update parameters that are split over ranks, as {split} is: it has no such step "
            "for DTensors\nWay out: another optimizer (--optimizer adamw, adam8bit, sgd), or whole parameters: dp and "
            "pp with zero=0."
        )
