"""Pooled look-ups as an operator of ours: against torch's, its derivative numerically, its fake shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.operators.bags import EMBEDDING_BAGS, EMBEDDING_BAGS_BACKWARD

ROWS, WIDTH, PADDING = 12, 3, 5
IDS = torch.tensor([3, 5, 3, 0, 11, 5, 7, 7, 2, 5])
OFFSETS = torch.tensor([0, 3, 3, 5, 9])  # the second bag is empty, the last holds nothing but padding
MODES = ("sum", "mean", "max")


def table() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)


def both(mode: str, padding: int, weights: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(ours, torch's) of ragged and of regular bags."""
    rows, ids = table(), IDS[:9].reshape(3, 3)
    index = None if padding < 0 else padding
    regular = None if weights is None else weights[:9].reshape(3, 3)
    ragged = EMBEDDING_BAGS(rows, IDS, OFFSETS, torch.arange(len(OFFSETS)), weights, None, mode, padding)
    square = EMBEDDING_BAGS(rows, ids, None, None, regular, None, mode, padding)
    return [
        (ragged, F.embedding_bag(IDS, rows, OFFSETS, mode=mode, per_sample_weights=weights, padding_idx=index)),
        (square, F.embedding_bag(ids, rows, mode=mode, per_sample_weights=regular, padding_idx=index)),
    ]


@pytest.mark.parametrize("padding", [-1, PADDING])
@pytest.mark.parametrize("mode", MODES)
def test_equals_torch(mode: str, padding: int) -> None:
    weights = torch.rand(len(IDS), dtype=torch.float64) if mode == "sum" else None
    for found, expected in both(mode, padding, None) + both(mode, padding, weights):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [-1, PADDING])
@pytest.mark.parametrize("mode", MODES)
def test_derivative(mode: str, padding: int) -> None:
    bags = torch.arange(1, 4)
    weights = torch.rand(len(IDS), dtype=torch.float64, requires_grad=True) if mode == "sum" else None

    def ragged(rows: Tensor, *scale: Tensor) -> Tensor:
        out: Tensor = EMBEDDING_BAGS(rows, IDS, OFFSETS, bags, *(scale or (None,)), None, mode, padding)
        return out

    def square(rows: Tensor) -> Tensor:
        out: Tensor = EMBEDDING_BAGS(rows, IDS.reshape(5, 2), None, None, None, None, mode, padding)
        return out

    leaves = (table(),) if weights is None else (table(), weights)
    assert torch.autograd.gradcheck(ragged, leaves)
    assert torch.autograd.gradcheck(square, (table(),))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_parts_of_the_table_add_up(mode: str) -> None:
    rows, bags = table().detach(), torch.arange(len(OFFSETS))
    whole = EMBEDDING_BAGS(rows, IDS, OFFSETS, bags, None, None, mode, PADDING)
    parts = [
        EMBEDDING_BAGS(part, IDS, OFFSETS, bags, None, torch.tensor(rank), mode, PADDING)
        for rank, part in enumerate(rows.chunk(3))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=1e-12)


def test_only_the_rows_of_the_wanted_bags_are_read() -> None:
    rows, ids = table().detach(), IDS.clone()
    ids[5:] = ROWS + 1000  # out of the table: reading them would fail
    found = EMBEDDING_BAGS(rows, ids, OFFSETS, torch.arange(2), None, None, "sum", -1)
    torch.testing.assert_close(found[0], rows[IDS[:3]].sum(0), rtol=1e-12, atol=1e-12)
    assert not found[1].any()


def test_fake_shapes() -> None:
    bags, weights = torch.arange(2), torch.rand(len(IDS), dtype=torch.float64)
    real = [table().detach(), IDS, OFFSETS, bags, weights]
    mode = FakeTensorMode()
    fake = [mode.from_tensor(tensor) for tensor in real]
    forward = EMBEDDING_BAGS(*real, None, "sum", -1)
    backward = EMBEDDING_BAGS_BACKWARD(forward, *real, None, "sum", -1)
    with mode:
        faked = EMBEDDING_BAGS(*fake, None, "sum", -1)
        faked_backward = EMBEDDING_BAGS_BACKWARD(faked, *fake, None, "sum", -1)
    for one, other in zip((forward, *backward), (faked, *faked_backward), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
