"""Rows picked by their position, where each rank has a part of the positions: of one rank each, zeros on the others."""

from __future__ import annotations

from dataclasses import replace

import torch

from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, value
from autopar.rules.halo import Chunks

aten = torch.ops.aten


def row_of(place: int, chunks: Chunks, node: Node) -> Node:
    """``select(x, dim, place)``: a summand of the row, zeros but on its rank."""
    x = node.args[0]
    assert isinstance(x, Node)
    size = chunks.length(x) // chunks.count
    chunk, inside = divmod(place, size)
    turned = chunk >= chunks.ways
    owner = 2 * chunks.ways - 1 - chunk if turned else chunk
    summand = chunks.emit.partial(value(node), chunks.axis)
    row = chunks.emit(aten.select.int, (x, chunks.dim, inside + size * turned), summand)
    elsewhere = chunks.emit(aten.logical_not.default, (chunks.is_rank(owner),), Value(torch.bool, Layout(())))
    return chunks.emit(aten.masked_fill.Scalar, (row, elsewhere, 0), summand)


def picked(chunks: Chunks, node: Node) -> Node:
    """``gather`` and ``index_select`` (x, dim, index): a summand of what is picked, by positions in the whole."""
    x, _, index = node.args
    assert isinstance(x, Node) and isinstance(index, Node)
    size = chunks.length(x) // chunks.count
    rank, numbers = chunks.emit.axis_index(chunks.axis), value(index)
    flags = replace(numbers, dtype=torch.bool)
    chunk = chunks.emit(aten.div.Tensor_mode, (index, size), numbers, kwargs={"rounding_mode": "floor"})
    inside = chunks.emit(aten.remainder.Scalar, (index, size), numbers)
    here = chunks.emit(aten.eq.Tensor, (chunk, rank), flags)
    if chunks.mirrored:
        last = chunks.emit(aten.rsub.Scalar, (rank, 2 * chunks.ways - 1), value(rank))
        second = chunks.emit(aten.eq.Tensor, (chunk, last), flags)
        behind = chunks.emit(aten.add.Scalar, (inside, size), numbers)
        inside = chunks.emit(aten.where.self, (second, behind, inside), numbers)
        here = chunks.emit(aten.bitwise_or.Tensor, (here, second), flags)
    summand = chunks.emit.partial(value(node), chunks.axis)
    rows = chunks.emit(node.target, (x, chunks.dim, inside), summand)
    elsewhere = chunks.emit(aten.logical_not.default, (here,), flags)
    if node.target is aten.index_select.default:
        elsewhere = _along_the_dim(chunks, elsewhere, len(value(node).shape))
    return chunks.emit(aten.masked_fill.Scalar, (rows, elsewhere, 0), summand)


def _along_the_dim(chunks: Chunks, flags: Node, rank: int) -> Node:
    """A vector as a tensor of ``rank`` dims, along the dim of the chunks."""
    kind = value(flags)
    at = chunks.dim
    dims = (*[()] * at, *kind.layout.dims, *[()] * (rank - 1 - at)) if kind.layout.dims else ((),) * rank
    shape = [1] * at + [*kind.shape] + [1] * (rank - 1 - at)
    whole = Layout.whole(shape)
    layout = replace(whole, dims=tuple(given or one for given, one in zip(dims, whole.dims)))
    return chunks.emit(aten.reshape.default, (flags, shape), replace(kind, layout=layout))
