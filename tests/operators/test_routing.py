"""Rows to the ranks of their experts, what is local about it: order, counts, ids that arrive, and columns."""

from __future__ import annotations

import pytest
import torch

from autopar.operators import routing
from autopar.operators.routing import (
    COLUMNS,
    COLUMNS_BACKWARD,
    PERMUTE_ROWS,
    RECEIVED_IDS,
    ROUTE_ROWS,
    ROW_SIZES,
    own_experts,
)

IDS = torch.tensor([0, 3, 2, 1, 0, 4, 4, 0, 9, 1])  # of five experts; one row belongs to none
PLACES = {"in order": None, "placed": [4, 2, 0, 1, 3]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("ways", (1, 2, 3, 4, 7))
def test_rows_are_in_the_order_of_ranks_then_experts_then_tokens(ways: int, places: list[int] | None) -> None:
    order, inverse, counts = ROUTE_ROWS(IDS, 5, ways, places)
    own = own_experts(5, ways)
    slots = [(places or list(range(5)))[e] if e < 5 else ways * own for e in IDS.tolist()]
    assert order.tolist() == sorted(range(len(slots)), key=slots.__getitem__), "a stable order"
    assert torch.equal(order[inverse], torch.arange(len(IDS)))
    for rank in range(ways):
        for place in range(own):
            assert counts[0, rank, place] == slots.count(rank * own + place)
        assert counts[0, rank, own] == (rank == ways - 1) * slots.count(ways * own), "of no expert: to the last rank"


@pytest.mark.parametrize("ways", (1, 2, 3, 7))
def test_what_arrives_knows_its_expert(ways: int) -> None:
    """Of ranks that all have the same ids each gets as many blocks of rows."""
    _, _, counts = ROUTE_ROWS(IDS, 5, ways)
    own, arrived = own_experts(5, ways), 0
    for rank in range(ways):
        received = counts[:, rank : rank + 1].expand(ways, 1, own + 1)
        send, receive = ROW_SIZES(counts, received)
        ids = RECEIVED_IDS(received, len(IDS))
        assert send.tolist() == counts.sum((0, 2)).tolist() and receive.sum() == len(ids)
        mine = [e - rank * own for e in sorted(IDS.tolist()) if e < 5 and e // own == rank]
        mine += [own] * (rank == ways - 1)
        assert ids.tolist() == mine * ways
        arrived += len(ids)
    assert arrived == len(IDS) * ways, "nothing is lost"


@pytest.mark.parametrize("k", (1, 2, 5))
def test_permuting_and_its_gradient(k: int) -> None:
    x = torch.randn(len(IDS) // k, 3, dtype=torch.float64, requires_grad=True)
    order, inverse, _ = ROUTE_ROWS(IDS, 5, 2)
    assert torch.equal(PERMUTE_ROWS(x, order, inverse), x.repeat_interleave(k, 0)[order])
    assert torch.autograd.gradcheck(lambda x: PERMUTE_ROWS(x, order, inverse), (x,))


@pytest.mark.parametrize(("dim", "start", "end", "step"), [(1, 0, 9, 2), (1, 1, 9, 2), (1, 2, 5, 1), (0, 1, 4, 3)])
def test_columns_are_a_slice(dim: int, start: int, end: int, step: int) -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    expected = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    found = COLUMNS(x, dim, start, end, step)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (found, expected))
    assert torch.equal(ours, theirs)
    assert torch.equal(COLUMNS_BACKWARD(grad, dim, x.shape[dim], start, step), theirs)


def test_shape_functions_and_registration() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    order, inverse, counts = ROUTE_ROWS(IDS, 5, 2)
    torch.library.opcheck(ROUTE_ROWS, (IDS, 5, 2))
    torch.library.opcheck(PERMUTE_ROWS, (x.requires_grad_(), order, inverse))
    torch.library.opcheck(COLUMNS, (x.detach().requires_grad_(), 1, 0, 4, 2))
    torch.library.opcheck(ROW_SIZES, (counts, counts.transpose(0, 1)))


def test_bad_ids_and_places_are_refused() -> None:
    fake = torch.empty(6, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="ids are a list of whole numbers, not torch.int64 \\[6, 2\\]"):
        ROUTE_ROWS(fake, 4, 2)
    with pytest.raises(ValueError, match="4 places, 3 of them different, for 4 experts"):
        ROUTE_ROWS(fake[:, 0], 4, 2, [0, 1, 1, 3])
    assert routing.own_experts(10, 4) == 3
