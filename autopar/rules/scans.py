"""Scans along a dim of which each rank has a part: a scan of each chunk, combined with the totals of those before it.

Only the totals travel, one row of each chunk: they are gathered, and each rank combines those of the chunks in front of
its own. (Blelloch 1990, Prefix Sums and Their Applications.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from autopar.ir import collectives as comm
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import Node, Value, value
from autopar.rules.halo import Chunks

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scan:
    """neutral: what changes no total. reduce, combine: of many totals, and of a scan and what is in front of it."""

    neutral: float
    reduce: Any
    combine: Any
    lists_dims: bool  # whether ``reduce`` takes a list of dims


SCANS: dict[Any, _Scan] = {
    aten.cumsum.default: _Scan(0.0, aten.sum.dim_IntList, aten.add.Tensor, True),
    aten.cumprod.default: _Scan(1.0, aten.prod.dim_int, aten.mul.Tensor, False),
    aten.logcumsumexp.default: _Scan(-math.inf, aten.logsumexp.default, aten.logaddexp.default, True),
}


def scanned(chunks: Chunks, node: Node) -> Node:
    """The scan ``node`` (x, dim) of this rank's chunks of x."""
    scan = SCANS[node.target]
    x, *rest = node.args
    assert isinstance(x, Node)
    own = [
        chunks.emit(node.target, (chunk, *rest), chunks.kind(value(node), chunks.length(chunk)), kwargs=node.kwargs)
        for chunk in chunks.taken_apart(x)
    ]
    totals = _gathered(chunks, [chunks.rows(each, chunks.length(each) - 1, chunks.length(each)) for each in own])
    rank = chunks.emit.axis_index(chunks.axis)
    places = [rank, _from_the_last(chunks, rank)][: chunks.count]
    pieces = [_continued(chunks, scan, each, totals, place) for each, place in zip(own, places)]
    return chunks.joined(pieces, value(node))


def _gathered(chunks: Chunks, rows: list[Node]) -> Node:
    """The totals of all chunks in order, on every rank."""
    count = chunks.count * chunks.ways
    kind = value(rows[0])
    dims = list(kind.layout.dims)
    parts, whole = list(dims), list(dims)
    mirrored = (Factor(2), Factor(chunks.ways, (chunks.axis,), mirrored=chunks.axis))
    parts[chunks.dim] = mirrored if chunks.mirrored else (Factor(count, (chunks.axis,)),)
    whole[chunks.dim] = (Factor(count),)
    own = chunks.joined(rows, replace(kind, layout=Layout(tuple(parts), kind.layout.partial)))
    where = comm.where(chunks.split, chunks.axis, chunks.ways, count)
    gathered = replace(kind, layout=Layout(tuple(whole), kind.layout.partial))
    return chunks.emit(comm.OPS.all_gather.default, (own, *where), gathered)


def _from_the_last(chunks: Chunks, rank: Node) -> Node:
    """The number of the second chunk in zig-zag order."""
    return chunks.emit(aten.rsub.Scalar, (rank, 2 * chunks.ways - 1), value(rank))


def _continued(chunks: Chunks, scan: _Scan, own: Node, totals: Node, place: Node) -> Node:
    """The scan of chunk number ``place``, behind all chunks before it."""
    count, kind = chunks.count * chunks.ways, value(totals)
    numbers = Value(torch.int64, Layout.whole((count,)))
    order = chunks.emit(aten.arange.default, (count,), numbers, kwargs={"dtype": torch.int64, "device": _HERE})
    later = chunks.emit(aten.ge.Tensor, (order, place), replace(numbers, dtype=torch.bool))
    shape = [count if d == chunks.dim else 1 for d in range(len(kind.shape))]
    later = chunks.emit(aten.reshape.default, (later, shape), Value(torch.bool, Layout.whole(shape)))
    neutral = int(scan.neutral) if not kind.dtype.is_floating_point else scan.neutral
    # a sum of nothing in logarithms has no gradient: it is that of all, and not used
    hidden = chunks.emit(aten.bitwise_and.Tensor, (later, _any_before(chunks, place)), value(later))
    mask = hidden if math.isinf(scan.neutral) else later
    before = chunks.emit(aten.masked_fill.Scalar, (totals, mask, neutral), kind)
    dims: Any = [chunks.dim] if scan.lists_dims else chunks.dim
    row = list(kind.layout.dims)
    row[chunks.dim] = (Factor(1),)
    total = replace(kind, layout=Layout(tuple(row), kind.layout.partial))
    front = chunks.emit(scan.reduce, (before, dims, True), total)
    found = chunks.emit(scan.combine, (own, front), value(own))
    if not math.isinf(scan.neutral):
        return found
    return chunks.emit(aten.where.self, (_any_before(chunks, place), found, own), value(own))


def _any_before(chunks: Chunks, place: Node) -> Node:
    return chunks.emit(aten.gt.Scalar, (place, 0), Value(torch.bool, Layout(())))


_HERE = torch.device("cpu")  # emitted as the device of the rank
