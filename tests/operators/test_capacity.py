"""Seats of experts: who sits where, rows into a buffer and out of it, and their gradients."""

from __future__ import annotations

import pytest
import torch

from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.routing import own_experts
from tests.dropping import kept

EXPERTS = 5
CHOSEN = torch.tensor([[0, 3], [2, 0], [0, 4], [4, 0], [0, 9], [9, 1]])  # two choices belong to no expert
PLACES = {"in order": None, "placed": [4, 2, 0, 1, 3]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("capacity", (1, 2, 3, 12))
@pytest.mark.parametrize("ways", (1, 2, 3, 7))
def test_first_choices_are_seated_first(ways: int, capacity: int, places: list[int] | None) -> None:
    ids, own = CHOSEN.flatten(), own_experts(EXPERTS, ways)
    seats, seated, counts = SEAT_ROWS(ids, EXPERTS, ways, capacity, 2, places)
    slots = dict(enumerate(places or range(EXPERTS)))
    expected = [ways * own * capacity] * len(ids)
    waiting = [2 * token + choice for choice in range(2) for token in range(len(CHOSEN))]
    wanted, taken = [0] * (ways * own), [0] * (ways * own)
    for row in waiting:
        slot = slots.get(int(ids[row]))
        if slot is not None:
            wanted[slot] += 1
            if taken[slot] < capacity:
                expected[row] = slot * capacity + taken[slot]
                taken[slot] += 1
    assert seats.tolist() == expected
    assert seated.tolist() == [
        expected.index(seat) if seat in expected else len(ids) for seat in range(ways * own * capacity)
    ]
    assert counts.shape == (1, ways, own + 1)
    assert counts[0, :, :own].flatten().tolist() == wanted
    of_rank = [sum(wanted[slot] - taken[slot] for slot in range(r * own, (r + 1) * own)) for r in range(ways)]
    assert counts[0, :, own].tolist() == of_rank, "those that are dropped; rows of no expert are not"


def test_the_rule_is_that_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(6, (40, 3), generator=generator)
    for capacity, factor in ((5, 0.25), (20, 1.0), (25, 1.25)):
        seats, _, counts = SEAT_ROWS(chosen.flatten(), 6, 1, capacity, 3)
        found = kept(chosen, torch.zeros(40, dtype=torch.int64), 6, factor)
        assert torch.equal((seats < 6 * capacity).view(40, 3), found)
        assert counts[0, 0, 6] == (~found).sum()


@pytest.mark.parametrize("k", (1, 2))
def test_filling_and_picking_are_each_the_derivative_of_the_other(k: int) -> None:
    ids = CHOSEN.flatten()
    seats, seated, _ = SEAT_ROWS(ids, EXPERTS, 2, 2, 2)
    x = torch.randn(len(ids) // k, 3, dtype=torch.float64, requires_grad=True)
    buffer = PICK_ROWS(x, seated, seats)
    for seat, row in enumerate(seated.tolist()):
        expected = x[row // k] if row < len(ids) else torch.zeros(3)
        assert torch.equal(buffer[seat], expected.to(x.dtype))
    out = PICK_ROWS(buffer, seats, seated)
    there = (seats < len(seated)).unsqueeze(1)
    assert not there.all() and torch.equal(out, x.repeat_interleave(k, 0) * there)
    assert torch.autograd.gradcheck(lambda x: PICK_ROWS(x, seated, seats), (x,))
    assert torch.autograd.gradcheck(lambda y: PICK_ROWS(y, seats, seated), (buffer.detach().requires_grad_(),))


def test_what_is_on_an_empty_seat_goes_nowhere() -> None:
    seats, seated, _ = SEAT_ROWS(torch.tensor([0, 0, 0, 2]), 3, 1, 2, 1)
    buffer = torch.full((6, 2), float("nan"), dtype=torch.float64)
    buffer[seats[seats < 6]] = 1.0
    out = PICK_ROWS(buffer.requires_grad_(), seats, seated)
    assert out.tolist() == [[1, 1], [1, 1], [0, 0], [1, 1]]
    (grad,) = torch.autograd.grad(out.sum(), buffer)
    assert grad[:, 0].tolist() == [1, 1, 0, 0, 1, 0]


def test_no_rows() -> None:
    seats, seated, counts = SEAT_ROWS(torch.zeros(0, dtype=torch.int64), 3, 2, 1, 2)
    assert len(seats) == 0 and seated.tolist() == [0] * 4 and not counts.any()
    assert not PICK_ROWS(torch.ones(0, 2), seated, seats).any()


def test_shape_functions_and_registration() -> None:
    seats, seated, _ = SEAT_ROWS(CHOSEN.flatten(), EXPERTS, 2, 2, 2)
    torch.library.opcheck(SEAT_ROWS, (CHOSEN.flatten(), EXPERTS, 2, 2, 2))
    torch.library.opcheck(PICK_ROWS, (torch.randn(6, 4, requires_grad=True), seated, seats))
    torch.library.opcheck(PICK_ROWS, (torch.randn(12, 4, requires_grad=True), seats, seated))


def test_what_does_not_fit_is_refused() -> None:
    ids = torch.empty(6, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="6 ids, 4 for each token, and 2 seats"):
        SEAT_ROWS(ids, 4, 2, 2, 4)
    with pytest.raises(ValueError, match="4 places, 3 of them different, for 4 experts"):
        SEAT_ROWS(ids, 4, 2, 2, 1, [0, 1, 1, 3])
    with pytest.raises(ValueError, match="6 rows to pick from are no multiple of the 4"):
        PICK_ROWS(torch.empty(4, 2, device="meta"), ids, ids)
