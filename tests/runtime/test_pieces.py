"""Cutting and joining against index arithmetic, for plain, uneven, blocked and proportional splits of every dim."""

from __future__ import annotations

import pytest
import torch

from autopar.ir.layout import Split, owned_indices
from autopar.runtime import pieces

WAYS = 2
FORMS = ((1, (1,), 8), (1, (1,), 7), (1, (1,), 1), (3, (1,), 12), (1, (4, 2, 2), 16), (2, (2, 1), 12))
SPLITS = [
    *((Split(dim, outer, ratio), length) for dim in (0, 1, 2) for outer, ratio, length in FORMS),
    *((Split(dim, outer, mirrored=True), 8) for dim in (0, 1, 2) for outer in (2, 4)),
]


def whole_of(split: Split, length: int) -> torch.Tensor:
    shape = [length if dim == split.dim else size for dim, size in enumerate((3, 4, 5))]
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("split, length", SPLITS, ids=str)
def test_take_and_put(split: Split, length: int) -> None:
    whole = whole_of(split, length)
    rebuilt = torch.zeros_like(whole)
    for position in range(WAYS):
        owned = owned_indices(length, split, position, WAYS)
        part = pieces.take(whole, split, position, WAYS)
        assert part.is_contiguous() and part.shape[split.dim] == -(-length // WAYS)
        assert torch.equal(part.narrow(split.dim, 0, len(owned)), whole.index_select(split.dim, owned))
        assert not part.narrow(split.dim, len(owned), part.shape[split.dim] - len(owned)).any()
        rebuilt += pieces.put(part, split, position, WAYS, length)
    assert torch.equal(rebuilt, whole)


@pytest.mark.parametrize("split, length", SPLITS, ids=str)
def test_apart_and_together(split: Split, length: int) -> None:
    whole = whole_of(split, length)
    parts = pieces.apart(whole, split, WAYS)
    assert parts.is_contiguous()
    for position in range(WAYS):
        assert torch.equal(parts[position], pieces.take(whole, split, position, WAYS))
    joined = pieces.together(parts, split, length)
    assert joined.is_contiguous() and torch.equal(joined, whole)


def test_a_plain_split_of_dim_0_is_not_copied() -> None:
    whole = torch.randn(8, 3)
    parts = pieces.apart(whole, Split(0), 2)
    assert parts.data_ptr() == whole.data_ptr()
    assert pieces.together(parts, Split(0), 8).data_ptr() == whole.data_ptr()
    assert pieces.take(whole, Split(0), 0, 2).data_ptr() == whole.data_ptr()


def test_padded() -> None:
    x = torch.ones(2, 3)
    assert pieces.padded(x, (2, 3)) is x
    assert pieces.padded(x, (3, 4)).sum() == 6
