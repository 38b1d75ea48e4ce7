"""Buffers with a fixed number of seats for each expert: who sits where, and rows into the buffer and out of it.

    seat_rows(ids, experts, ways, capacity, choices, places) -> seats, seated, counts
    pick_rows(x, picks, back) -> out            out[j] = x[picks[j] // k], zero where picks[j] is len(back) or more

    ids (T * choices) whole numbers        seats (T * choices)                     x (len(back) / k, ...)
    counts (1, ways, own + 1)              seated (ways * own * capacity)          out (len(picks), ...)

``ways`` ranks have ``own = ceil(experts / ways)`` experts each, and an expert has ``capacity`` seats. First the first
choices of all tokens are seated, in the order of the tokens, then their second choices, and so on; who finds no seat at
its expert is dropped (Lepikhin et al. 2020, GShard, section 2.2 and algorithm 1). ``seats``: the seat of each row, or
the number of seats where it has none: it was dropped, or belongs to no expert (an id of ``experts`` or more).
``seated``: the row on each seat, or the number of rows where it is empty.

``pick_rows(x, seated, seats)`` fills a buffer with rows, or with one row for each token; ``pick_rows(buffer, seats,
seated)`` takes them out of it. Each is the derivative of the other.

``counts``: how many rows wanted each expert of each rank; the last of ``own + 1`` counts those that these dropped.

All sizes follow from the arguments, and nothing waits for a device (but ``places`` are copied to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.operators.experts import added_copies
from autopar.operators.registry import library
from autopar.operators.routing import check_experts, own_experts, remember_rows, slots_of

_LIBRARY = library(
    "seat_rows(Tensor ids, int experts, int ways, int capacity, int choices, int[]? places=None)"
    " -> (Tensor, Tensor, Tensor)",
    "pick_rows(Tensor x, Tensor picks, Tensor back) -> Tensor",
)
SEAT_ROWS = torch.ops.autopar.seat_rows.default
PICK_ROWS = torch.ops.autopar.pick_rows.default

# ---------------------------------------------------------------- seats


def _seat(
    ids: Tensor, experts: int, ways: int, capacity: int, choices: int, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    own, rows = own_experts(experts, ways), torch.arange(len(ids), device=ids.device)
    slots = slots_of(ids, experts, ways, places)
    queue, order = slots.view(-1, choices).t().reshape(-1).sort(stable=True)
    starts = torch.searchsorted(queue, torch.arange(ways * own + 1, device=ids.device))
    wanted, turn = starts.diff(), rows - starts[queue]
    nowhere = ways * own * capacity
    found = torch.where((turn < capacity) & (queue < ways * own), queue * capacity + turn, nowhere)
    by_choice = torch.empty_like(found).scatter_(0, order, found)
    seats = by_choice.view(choices, -1).t().reshape(-1)
    seated = torch.full((nowhere + 1,), len(ids), dtype=rows.dtype, device=ids.device).scatter_(0, seats, rows)
    dropped = (wanted - capacity).clamp(min=0).view(ways, own).sum(1, keepdim=True)
    return seats, seated[:-1].clone(), torch.cat([wanted.view(ways, own), dropped], 1).unsqueeze(0)


@torch.library.register_fake("autopar::seat_rows", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _seat_shape(
    ids: Tensor, experts: int, ways: int, capacity: int, choices: int, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_experts(ids, experts, places)
    if capacity < 1 or choices < 1 or len(ids) % choices:
        raise ValueError(f"experts: {len(ids)} ids, {choices} for each token, and {capacity} seats: not a whole number")
    own = own_experts(experts, ways)
    sizes = (ids.shape, (ways * own * capacity,), (1, ways, own + 1))
    seats, seated, counts = (ids.new_empty(size, dtype=torch.int64) for size in sizes)
    return seats, seated, counts


# ---------------------------------------------------------------- rows


def _pick(x: Tensor, picks: Tensor, back: Tensor) -> Tensor:
    if not len(x):
        return x.new_zeros((len(picks), *x.shape[1:]))
    rows = x.index_select(0, picks.clamp(max=len(back) - 1) // (len(back) // len(x)))
    return rows.masked_fill_((picks >= len(back)).view(-1, *[1] * (x.dim() - 1)), 0)


@torch.library.register_fake("autopar::pick_rows", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _pick_shape(x: Tensor, picks: Tensor, back: Tensor) -> Tensor:
    if len(back) % max(len(x), 1):
        raise ValueError(f"experts: {len(back)} rows to pick from are no multiple of the {len(x)} that are there")
    return x.new_empty((len(picks), *x.shape[1:]))


def _pick_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    picks, back = ctx.saved_tensors
    return added_copies(PICK_ROWS(grad, back, picks), ctx.rows), None, None


torch.library.register_autograd("autopar::pick_rows", _pick_derivative, setup_context=remember_rows, lib=_LIBRARY)

for _name, _kernel in {"seat_rows": _seat, "pick_rows": _pick}.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
