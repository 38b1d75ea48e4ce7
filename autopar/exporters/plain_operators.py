"""The operators of autopar in plain torch: what stands for them in exported programs.

They compute the same, from operators that any tool knows. Where a kernel of autopar reads numbers (a rank, the ends of
the rows of an expert) these compute with tensors, so that one trace serves all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.exporters.functional import holds
from autopar.operators import losses
from autopar.operators.attention_operands import accumulated, alike, scale_of
from autopar.operators.attention_tile import MERGE, TILE
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.experts import EXPERT_LINEAR
from autopar.operators.masked_attention import masked_attention
from autopar.operators.predicates import parse
from autopar.operators.recurrent import CELLS, RECURRENT_LAYER
from autopar.operators.routing import COLUMNS, PERMUTE_ROWS, RECEIVED_IDS, ROUTE_ROWS, ROW_SIZES, own_experts, slots_of
from autopar.operators.straight_through import STRAIGHT_THROUGH

# ---------------------------------------------------------------- attention


def attention_tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor], rank: Tensor | None,
    where: str, step: int, ways: int, mirrored: bool, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :mod:`autopar.operators.attention_tile`, with all scores at once."""
    rows, columns = positions(q, k, rank, step, ways, mirrored)
    if q.dim() > 3:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)).to(accumulated(q.dtype)) * scale_of(q, scale)
    mask = hidden(q, bias, vectors, where, rows, columns, step)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype is torch.bool else scores + mask
    largest = scores.amax(-1, keepdim=True)
    some = largest > -math.inf  # rows that may attend to nothing are zeros
    largest = torch.where(some, largest, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul((weights / torch.where(some, total, 1.0)).to(v.dtype), v)
    return out, (largest + total.log()).squeeze(-1)


def positions(q: Tensor, k: Tensor, rank: Tensor | None, step: int, ways: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """The places in the whole of the rows of q, and of those of k."""
    here = torch.zeros((), dtype=torch.int64) if rank is None else rank
    rows = _places(q.shape[-2], here, ways, mirrored)
    if step < 0:
        return rows, torch.arange(k.shape[-2])
    return rows, _places(k.shape[-2], (here - step) % ways, ways, mirrored)


def _places(length: int, rank: Tensor, ways: int, mirrored: bool) -> Tensor:
    """Those of the part of a rank, see autopar/operators/attention_blocks.py."""
    if not mirrored or ways == 1:
        return torch.arange(length) + rank * length
    half = torch.arange(length // 2)
    return torch.cat([half + rank * (length // 2), half + (2 * ways - 1 - rank) * (length // 2)])


def hidden(
    q: Tensor, bias: Tensor | None, vectors: list[Tensor], where: str, rows: Tensor, columns: Tensor, step: int
) -> Tensor | None:
    """The formula and the bias as one mask of the scores: bool (True takes part) or float (added)."""
    if bias is not None and bias.shape[-1] > 1 and step >= 0:
        bias = bias.index_select(-1, columns)
    formula = parse(where)
    if not formula.clauses:
        return bias
    shown = formula.evaluate(rows, columns, vectors)
    shown = shown.unsqueeze(-3) if q.dim() > 3 and shown.dim() > 2 else shown
    if bias is None:
        return shown
    return bias & shown if bias.dtype is torch.bool else bias.masked_fill(shown.logical_not(), -math.inf)


def merge_tiles(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """As :mod:`autopar.operators.attention_tile`; the sum of two that are -inf is that."""
    largest = torch.maximum(logsumexp, other_logsumexp)
    some = largest > -math.inf
    base = torch.where(some, largest, 0.0)
    ours, theirs = torch.exp(logsumexp - base), torch.exp(other_logsumexp - base)
    both, wide = ours + theirs, logsumexp.dtype
    share = (theirs / torch.where(some, both, 1.0)).unsqueeze(-1)
    merged = out.to(wide) * (1 - share) + other.to(wide) * share
    return merged.to(out.dtype), base + both.log()


def attention_under_formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor], where: str, scale: float | None = None
) -> Tensor:
    """As :func:`autopar.operators.masked_attention.masked_attention`."""
    q, k, v = alike(q, k, v)
    if where == "j<=i" and bias is None and q.shape[-2] == k.shape[-2]:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.dim() > 3 and q.shape[-3] != k.shape[-3]
        )
    return attention_tile(q, k, v, bias, vectors, None, where, 0, 1, False, scale)[0]


# ---------------------------------------------------------------- experts


def expert_linear(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """As :mod:`autopar.operators.experts`: every expert multiplies every row, and each row keeps that of its own."""
    copies = _copies(ids, rows)
    found = torch.zeros((ids.shape[0], weight.shape[2]), dtype=rows.dtype)
    for expert in range(weight.shape[0]):
        product = rows @ weight[expert]
        if copies > 1:
            product = product.repeat_interleave(copies, 0)
        found = torch.where((ids == expert).unsqueeze(1), product, found)
    return found


def route_rows(
    ids: Tensor, experts: int, ways: int, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :mod:`autopar.operators.routing`. The order is that of distinct numbers, so that any sort will do."""
    own, count = own_experts(experts, ways), ids.shape[0]
    slots = slots_of(ids, experts, ways, places)
    bins = slots + (slots // own).clamp(max=ways - 1)
    order = _stable_order(bins)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(count))
    return order, inverse, _counted(bins, ways * (own + 1)).view(1, ways, own + 1)


def _stable_order(numbers: Tensor) -> Tensor:
    return torch.argsort(numbers * numbers.shape[0] + torch.arange(numbers.shape[0]))


def _counted(numbers: Tensor, bins: int) -> Tensor:
    return (numbers.unsqueeze(0) == torch.arange(bins).unsqueeze(1)).sum(1)


def row_sizes(counts: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    return counts.sum((0, 2)), received.sum((1, 2))


def received_ids(received: Tensor, rows: int) -> Tensor:
    """The expert of each row that arrived: the number of ends that it lies behind, as a number of its rank."""
    ways, _, bins = received.shape
    counts = received.flatten()
    total = counts.sum().item()
    holds(total >= 0)
    ends = counts.cumsum(0)
    places = torch.arange(total)
    return (places.unsqueeze(1) >= ends.unsqueeze(0)).sum(1) % bins


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """As :mod:`autopar.operators.routing`."""
    copies = _copies(order, x)
    return x.index_select(0, order if copies == 1 else order // copies)


def _copies(places: Tensor, x: Tensor) -> int:
    """How many of ``places`` each row of ``x`` stands for: one where a number is known at run time only."""
    wanted, there = places.shape[0], x.shape[0]
    if isinstance(wanted, int) and isinstance(there, int):
        return wanted // there
    times = sympy.cancel(_expression(wanted) / _expression(there))
    if times.is_Integer:
        return int(times)
    holds(wanted == there)
    return 1


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def columns(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    found: Tensor = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    return found.contiguous()


def seat_rows(
    ids: Tensor, experts: int, ways: int, capacity: int, choices: int, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :mod:`autopar.operators.capacity`."""
    own, count = own_experts(experts, ways), ids.shape[0]
    slots = slots_of(ids, experts, ways, places).view(-1, choices).t().reshape(-1)
    order = _stable_order(slots)
    queue = slots.index_select(0, order)
    wanted = _counted(slots, ways * own + 1)
    starts = wanted.cumsum(0) - wanted
    turn = torch.arange(count) - starts.index_select(0, queue)
    nowhere = ways * own * capacity
    found = torch.where((turn < capacity) & (queue < ways * own), queue * capacity + turn, nowhere)
    by_choice = torch.zeros_like(found).scatter(0, order, found)
    seats = by_choice.view(choices, -1).t().reshape(-1)
    seated = torch.full((nowhere + 1,), count).scatter(0, seats, torch.arange(count))
    wanted = wanted[:-1].view(ways, own)
    dropped = (wanted - capacity).clamp(min=0).sum(1, keepdim=True)
    return seats, seated[:-1].clone(), torch.cat([wanted, dropped], 1).unsqueeze(0)


def pick_rows(x: Tensor, picks: Tensor, back: Tensor) -> Tensor:
    """As :mod:`autopar.operators.capacity`."""
    rows = x.index_select(0, picks.clamp(max=back.shape[0] - 1) // (back.shape[0] // x.shape[0]))
    empty = (picks >= back.shape[0]).view(-1, *[1] * (x.dim() - 1))
    return rows.masked_fill(empty, 0)


# ---------------------------------------------------------------- bags, recurrent layers, others


def embedding_bags(
    table: Tensor, ids: Tensor, offsets: Tensor | None, bags: Tensor | None, weights: Tensor | None,
    rank: Tensor | None, mode: str, padding_idx: int, total: int = 0,
) -> Tensor:  # fmt: skip
    """As :mod:`autopar.operators.bags`: which row belongs to which bag is a matrix of the two."""
    if offsets is None or bags is None:
        member = torch.eye(ids.shape[0], dtype=torch.bool).repeat_interleave(ids.shape[1], 1)  # (B, n)
        rows = ids.reshape(-1)
    else:
        rows = ids
        ends = torch.cat([offsets, torch.full((1,), ids.shape[0], dtype=offsets.dtype)])
        first, last = ends.index_select(0, bags), ends.index_select(0, bags + 1)
        places = torch.arange(ids.shape[0])
        member = (places >= first.unsqueeze(1)) & (places < last.unsqueeze(1))
    member = member & (rows != padding_idx)
    members = member.sum(1, keepdim=True)
    if rank is not None:
        rows = rows - rank * table.shape[0]
        member = member & (rows >= 0) & (rows < table.shape[0])
        rows = rows.clamp(0, table.shape[0] - 1)
    found = F.embedding(rows, table)  # (n, H)
    if mode == "max":
        shown = torch.where(member.unsqueeze(2), found.unsqueeze(0), -math.inf).amax(1)
        return torch.where(shown > -math.inf, shown, 0.0)
    factor = member.to(table.dtype)
    if mode == "mean":
        factor = factor / members.clamp(min=1).to(table.dtype)
    if weights is not None:
        factor = factor * weights.reshape(1, -1)
    return factor @ found


def recurrent_layer(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor]:
    """As :mod:`autopar.operators.recurrent`, by torch's own layers."""
    first = [state.unsqueeze(0) for state in states]
    y, *final = CELLS[cell](
        x, first if cell == "lstm" else first[0], list(weights), len(weights) >= 4, 1, 0.0, False, False, False
    )
    return y, final[-1].squeeze(0)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    return value.clone()


# ---------------------------------------------------------------- losses


def cross_entropy_sums(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """As :mod:`autopar.operators.losses`."""
    total, count = losses.cross_entropy_sums(logits, target, weight, ignore_index, label_smoothing)
    return total, losses.count_of(target, weight, ignore_index, count.dtype)


def nll_loss_forward(
    logarithms: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """As aten's, whose second result is 1 in what torch.onnx makes of it (torch 2.13)."""
    total, count = torch.ops.aten.nll_loss_forward(logarithms, target, weight, reduction, ignore_index)
    return total, losses.count_of(target, weight, ignore_index, count.dtype) if reduction else count


PLAIN: dict[Any, Callable[..., Any]] = {
    TILE: attention_tile,
    MERGE: merge_tiles,
    masked_attention: attention_under_formula,
    EXPERT_LINEAR: expert_linear,
    ROUTE_ROWS: route_rows,
    ROW_SIZES: row_sizes,
    RECEIVED_IDS: received_ids,
    PERMUTE_ROWS: permute_rows,
    COLUMNS: columns,
    SEAT_ROWS: seat_rows,
    PICK_ROWS: pick_rows,
    EMBEDDING_BAGS: embedding_bags,
    RECURRENT_LAYER: recurrent_layer,
    STRAIGHT_THROUGH: straight_through,
    losses.cross_entropy_sums: cross_entropy_sums,
    torch.ops.aten.nll_loss_forward.default: nll_loss_forward,
    torch.ops.aten.view.default: torch.reshape,  # results are not always laid out as the kernels lay theirs out
}
