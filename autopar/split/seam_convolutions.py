"""The settings of a convolution along one of its dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip


@dataclass(frozen=True)
class Taps:
    """What a convolution reads along one of its dims, and its settings along all of them."""

    before: int
    reach: int
    stride: int
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    dilations: tuple[int, ...]


def taps_of(given: dict[str, Any], weight: tuple[int, ...], count: int, place: int) -> Taps:
    strides, dilations = (_each(given.get(name, 1), count) for name in ("stride", "dilation"))
    reaches = [(taps - 1) * dilation + 1 for taps, dilation in zip(weight[2:], dilations)]
    padding = given.get("padding", 0)
    if padding == "same":
        paddings = tuple((reach - 1) // 2 for reach in reaches)
    else:
        paddings = _each(0 if padding == "valid" else padding, count)
    return Taps(paddings[place], reaches[place], strides[place], strides, paddings, dilations)


def _each(given: Any, count: int) -> tuple[int, ...]:
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return tuple(int(number) for number in (numbers * count if len(numbers) == 1 else numbers))


def without(paddings: tuple[int, ...], place: int) -> list[int]:
    return [0 if i == place else padding for i, padding in enumerate(paddings)]
