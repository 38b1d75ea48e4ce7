"""Random masks and numbers that depend on the position of an element in the whole tensor, never on the mesh.

A counter-based generator (Salmon et al. 2011): the value at a position is a hash of (seed, salt, position), so a rank
that holds a part of a tensor draws exactly the numbers that a single device draws there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.operators.registry import operator


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64, which wraps around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _wrapped(number: int) -> int:
    """``number`` wrapped around as in int64 arithmetic."""
    return (number + 2**63) % 2**64 - 2**63


@operator
def random_keep(seed: Tensor, salt: int, p: float, *positions: Tensor) -> Tensor:
    """A bool mask, False with probability ``p``. positions: one int64 vector per dim, the global index of each row.

    seed int64 scalar; salt tells the dropouts of one model apart. Returns a mask of (len(positions[0]), ...).
    """
    return _drawn(seed, salt, positions) >= int(p * 2**31)


@operator
def random_uniform(seed: Tensor, salt: int, low: float, high: float, dtype: torch.dtype, *positions: Tensor) -> Tensor:
    """Numbers between ``low`` and ``high`` with a resolution of 2^-31 of their distance; else as ``random_keep``."""
    share = _drawn(seed, salt, positions).to(torch.float64) / 2**31
    return (low + (high - low) * share).to(dtype)


def _drawn(seed: Tensor, salt: int, positions: tuple[Tensor, ...]) -> Tensor:
    """A number in [0, 2^31) for each combination of positions."""
    state = _mixed(seed + _wrapped(salt * 0x1E3779B97F4A7C15))
    for dim, index in enumerate(positions[:-1]):
        state = _mixed(state.unsqueeze(-1) ^ _mixed(index.to(seed.device) + _wrapped((dim + 1) * 0x1E3779B97F4A7C15)))
    last = _mixed(positions[-1].to(seed.device) + 0x2545F4914F6CDD1D)
    drawn = (state.unsqueeze(-1) ^ last) * -4658895280553007687
    drawn = (drawn ^ ((drawn >> 32) & 0xFFFFFFFF)) * -7723592293110705685
    return (drawn >> 33) & 0x7FFFFFFF
