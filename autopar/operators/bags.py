"""Pooled look-ups (``nn.EmbeddingBag``) when a rank has some of the bags, or some of the table's rows.

    autopar::embedding_bags(table, ids, offsets, bags, weights, rank, mode, padding_idx, total) -> pooled (B, H)
    autopar::embedding_bags_backward(grad, ...the same) -> dtable, dweights

    table (V, H)   mode "sum", "mean" or "max"; rows that are padding_idx (-1: none) do not count
    ids (B, L), with offsets and bags None: B bags of as many rows each; weights (B, L) or None
    ids (N), the rows of all bags one after the other, with offsets (all bags, or one more), where each begins, and
        bags (B), the numbers of those that are required, without gaps; weights (N) or None
    rank: the table is rows rank * V and following of a larger one, rows that are elsewhere count zero; or None
    total: the rows of the larger one, others raise IndexError; 0: unknown, as in older programs

Only the rows of the required bags are read. The weights are for "sum"; dweights is empty without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.operators.embedding import within
from autopar.operators.registry import library

_ARGUMENTS = (
    "Tensor table, Tensor ids, Tensor? offsets, Tensor? bags, Tensor? weights, Tensor? rank, "
    "str mode, int padding_idx, int total=0"
)
_LIBRARY = library(
    f"embedding_bags({_ARGUMENTS}) -> Tensor",
    f"embedding_bags_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
EMBEDDING_BAGS = torch.ops.autopar.embedding_bags.default
EMBEDDING_BAGS_BACKWARD = torch.ops.autopar.embedding_bags_backward.default


@dataclass(frozen=True)
class _Reads:
    """The rows that are read from the table, one entry for each row of a bag: n in all, for ids from ``first`` on."""

    first: int
    rows: Tensor  # (n), the row of this rank's table
    owner: Tensor  # (n), the bag to which it belongs, ascending
    begins: Tensor  # (B), the first entry of each bag
    factor: Tensor  # (n), its weight in the sum
    counts: Tensor  # (n), whether it counts at all


def _reads(
    table: Tensor, ids: Tensor, offsets: Tensor | None, bags: Tensor | None, weights: Tensor | None,
    rank: Tensor | None, mode: str, padding_idx: int, total: int = 0,
) -> _Reads:  # fmt: skip
    first = 0
    if offsets is None or bags is None:
        rows, count = ids.reshape(-1), ids.shape[1]
        begins = torch.arange(ids.shape[0], device=ids.device) * count
        scale = None if weights is None else weights.reshape(-1)
    else:
        after = int(bags[-1]) + 1
        first, stop = int(offsets[bags[0]]), int(offsets[after]) if after < len(offsets) else len(ids)
        rows, begins = ids[first:stop], offsets[bags] - first
        scale = None if weights is None else weights[first:stop]
    places = torch.arange(len(rows), dtype=begins.dtype, device=rows.device)
    owner = torch.searchsorted(begins, places, right=True) - 1
    counts = rows != padding_idx
    factor = counts.to(table.dtype)
    if mode == "mean":
        members = table.new_zeros(len(begins)).index_add_(0, owner, factor)
        factor = factor / members.clamp(min=1)[owner]
    if rank is not None:
        asked, rows = rows, rows - rank * len(table)
        counts = counts & (rows >= 0) & (rows < len(table))
        places = rows.clamp(0, len(table) - 1)
        rows = within(asked, total, places, len(table)) if total else places
        factor = factor * counts
    return _Reads(first, rows, owner, begins, factor if scale is None else factor * scale, counts)


def _pooled(table: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    reads = _reads(table, ids, *rest)
    if rest[4] == "max":
        return _maxima(F.embedding(reads.rows, table), reads)
    if len(reads.rows) == 0:
        return table.new_zeros((len(reads.begins), table.shape[1]))
    return F.embedding_bag(reads.rows, table, reads.begins, mode="sum", per_sample_weights=reads.factor)


def _maxima(found: Tensor, reads: _Reads) -> Tensor:
    """(n, H) -> (B, H); zeros for a bag without rows."""
    shown = found.masked_fill(~reads.counts[:, None], -torch.inf)
    largest = found.new_full((len(reads.begins), found.shape[1]), -torch.inf)
    largest.scatter_reduce_(0, reads.owner[:, None].expand_as(shown), shown, "amax")
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _pooled_backward(grad: Tensor, table: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reads = _reads(table, ids, *rest)
    weights: Tensor | None = rest[2]
    spread = grad[reads.owner]  # (n, H)
    change = spread * (_picked(table, reads) if rest[4] == "max" else reads.factor[:, None])
    dtable = torch.zeros_like(table).index_add_(0, reads.rows, change.to(table.dtype))
    if weights is None:
        return dtable, table.new_empty(0)
    dweights = weights.new_zeros(weights.numel())
    products = (spread * table[reads.rows]).sum(1) * reads.counts
    dweights[reads.first : reads.first + len(products)] = products
    return dtable, dweights.reshape(weights.shape)


def _picked(table: Tensor, reads: _Reads) -> Tensor:
    """(n, H), True at the first of the largest entries in each bag."""
    found = table[reads.rows]
    at_top = (found == _maxima(found, reads)[reads.owner]) & reads.counts[:, None]
    count = len(reads.rows)
    places = torch.where(at_top, torch.arange(count, device=found.device)[:, None], count)  # (n, H)
    earliest = places.new_full((len(reads.begins), found.shape[1]), count)
    earliest.scatter_reduce_(0, reads.owner[:, None].expand_as(places), places, "amin")
    return at_top & (places == earliest[reads.owner])


_LIBRARY.impl("embedding_bags", _pooled, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("embedding_bags_backward", _pooled_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

# ---------------------------------------------------------------- shapes and derivative


@torch.library.register_fake("autopar::embedding_bags", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(table: Tensor, ids: Tensor, offsets: Tensor | None, bags: Tensor | None, *rest: Any) -> Tensor:
    return table.new_empty((len(ids if bags is None else bags), table.shape[1]))


@torch.library.register_fake("autopar::embedding_bags_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(
    grad: Tensor, table: Tensor, ids: Tensor, offsets: Any, bags: Any, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), table.new_empty(0 if weights is None else weights.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.choices = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dtable, dweights = EMBEDDING_BAGS_BACKWARD(grad, *ctx.saved_tensors, *ctx.choices)
    wanted = ctx.needs_input_grad[4]
    return dtable, None, None, None, dweights if wanted else None, None, *[None] * len(ctx.choices)


torch.library.register_autograd("autopar::embedding_bags", _derivative, setup_context=_remember, lib=_LIBRARY)
