"""Cutting and joining against index arithmetic, for plain, uneven, blocked and proportional splits of every dim."""

from __future__ import annotations

import pytest
import torch

from autopar.communication import pieces
from autopar.ir.layout import Split, owned_indices

WAYS = 2
FORMS = ((1, (1,), 8), (1, (1,), 7), (1, (1,), 2), (1, (1,), 1), (3, (1,), 12), (1, (4, 2, 2), 16), (2, (2, 1), 12))
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


@pytest.mark.parametrize("dim", range(3))
def test_parts_of_one_element_are_joined_contiguously(dim: int) -> None:
    """Where each has one element along the dim, and what is around it has one too, strides alone could say it."""
    shape = [4 if d == dim else 1 for d in range(3)]
    for sizes in (shape, [size if d == dim else 2 for d, size in enumerate(shape)]):
        whole = torch.randn(sizes)
        parts = pieces.apart(whole, Split(dim), 4)
        for given in (parts, parts.transpose(0, 1).contiguous().transpose(0, 1)):  # as a collective may hand them out
            joined = pieces.together(given, Split(dim), 4)
            assert joined.is_contiguous() and torch.equal(joined, whole)
            assert joined.view(-1).shape == (whole.numel(),) and joined.stride() == whole.stride()


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


ORDERS = [
    Split(1),
    Split(1, outer=2, mirrored=True),
    Split(1, outer=3),
    Split(1, ratio=(2, 1)),
    Split(1, outer=4, mirrored=True),
]


@pytest.mark.parametrize("ways", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("target", ORDERS, ids=str)
@pytest.mark.parametrize("source", ORDERS, ids=str)
def test_blocks_that_cross_from_order_to_order(source: Split, target: Split, ways: int) -> None:
    """What ranks send each other, and the order in which each puts what it gets, make the other order."""
    length = 36 * ways
    whole = torch.arange(2 * length).view(2, length)
    sent: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(ways):
        way = pieces.crossing(source, target, length, rank, ways)
        part = pieces.take(whole, source, rank, ways)
        blocks = torch.stack([part.narrow(1, block * way.size, way.size) for block in way.order])
        sent |= {(rank, peer): piece for peer, piece in enumerate(blocks.split(list(way.counts)))}
    for rank in range(ways):
        back = pieces.crossing(target, source, length, rank, ways)
        assert [len(sent[peer, rank]) for peer in range(ways)] == list(back.counts)
        got = torch.cat([sent[peer, rank] for peer in range(ways)])
        found = torch.cat([got[back.order.index(block)] for block in range(len(back.order))], 1)
        assert torch.equal(found, pieces.take(whole, target, rank, ways))
