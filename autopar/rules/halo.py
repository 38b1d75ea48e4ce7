"""Halo exchange: what a rank needs of its neighbours' parts where an operator reads positions beside its own.

Each rank has one chunk of a dim, or in zig-zag order (``Split.mirrored``) the chunks r and 2n-1-r of 2n. A chunk gets
the last rows of the chunk before it and the first rows of the one behind it: only those rows travel, by ``comm.shift``,
whose dual brings their gradients back. At both ends of the whole dim there are zeros (or another number), or, in a
ring, the rows of the other end.

    plain     rank r's neighbours are r-1 and r+1; halos longer than a chunk take several shifts
    zig-zag   chunk r's are on ranks r-1 and r+1, chunk 2n-1-r's on r+1 and r-1; at r = 0 and n-1 they are its own
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from autopar.ir import collectives as comm
from autopar.ir.layout import Factor, Layout, Split
from autopar.ir.node import Node, Value, value
from autopar.rules.factoring import Emit

aten = torch.ops.aten
RING = None  # in place of the number at the ends


@dataclass(frozen=True)
class Chunks:
    """A dim that ``ways`` ranks of ``axis`` split, in zig-zag order or not, and the operators on a rank's chunks."""

    emit: Emit
    axis: str
    ways: int
    dim: int
    mirrored: bool

    @property
    def split(self) -> Split:
        return Split(self.dim, outer=2, mirrored=True) if self.mirrored else Split(self.dim)

    @property
    def count(self) -> int:
        """Of the chunks of each rank."""
        return 2 if self.mirrored else 1

    def length(self, part: Node) -> int:
        """Of the dim, on one rank."""
        whole = value(part).shape[self.dim]
        return whole // self.ways

    def kind(self, like: Node | Value, length: int) -> Value:
        """The type of rows of each rank, ``length`` of them, as if all were joined in the order of the ranks."""
        found = like if isinstance(like, Value) else value(like)
        dims = list(found.layout.dims)
        dims[self.dim] = (Factor(length * self.ways, (self.axis,)),)
        return replace(found, layout=Layout(tuple(dims), found.layout.partial))

    def rows(self, part: Node, start: int, stop: int) -> Node:
        """The rows [start, stop) of what this rank has."""
        if (start, stop) == (0, self.length(part)):
            return part
        return self.emit(aten.slice.Tensor, (part, self.dim, start, stop, 1), self.kind(part, stop - start))

    def taken_apart(self, part: Node) -> list[Node]:
        """The chunks of a rank's part, in its order."""
        size = self.length(part) // self.count
        return [self.rows(part, i * size, (i + 1) * size) for i in range(self.count)]

    def joined(self, pieces: list[Node], like: Value | None = None) -> Node:
        if len(pieces) == 1:
            return pieces[0]
        kind = like or self.kind(pieces[0], sum(map(self.length, pieces)))
        return self.emit(aten.cat.default, (pieces, self.dim), kind)

    def is_rank(self, rank: int) -> Node:
        """Whether this rank is the one at ``rank``: a bool scalar."""
        here = Value(torch.bool, Layout(()))
        return self.emit(aten.eq.Scalar, (self.emit.axis_index(self.axis), rank % self.ways), here)

    def shifted(self, rows: Node, by: int) -> Node:
        """What the rank ``by`` before this one has."""
        return self.emit(comm.OPS.shift.default, (rows, self.axis, self.ways, by), value(rows))

    def chosen(self, condition: Node, one: Node | float, other: Node) -> Node:
        if isinstance(one, Node):
            return self.emit(aten.where.self, (condition, one, other), value(other))
        return self.emit(aten.masked_fill.Scalar, (other, condition, one), value(other))


def fits(length: int, ways: int, mirrored: bool, longest: int) -> bool:
    """Whether halos of ``longest`` rows can be exchanged: in zig-zag order they are no longer than a chunk."""
    return not mirrored or longest <= length // (2 * ways)


def with_halo(chunks: Chunks, part: Node, before: int, after: int, end: float | None) -> list[Node]:
    """Each chunk of ``part`` with ``before`` rows of those in front of it and ``after`` of those behind it.

    ``end``: what stands beyond the ends of the whole dim; RING for the rows of its other end.
    """
    own = chunks.taken_apart(part)
    sides: list[tuple[list[Node], list[Node]]]
    if chunks.mirrored:
        sides = _zigzag(chunks, own, before, after, end)
    else:
        sides = [(_hops(chunks, own[0], before, 1, end)[::-1], _hops(chunks, own[0], after, -1, end))]
    return [chunks.joined([*front, chunk, *behind]) for chunk, (front, behind) in zip(own, sides)]


def _hops(chunks: Chunks, chunk: Node, count: int, towards: int, end: float | None) -> list[Node]:
    """``count`` rows of the neighbours in front (``towards`` 1) or behind (-1), the nearest neighbour's first."""
    size, found, hop = chunks.length(chunk), list[Node](), 1
    while count > 0:
        rows = min(size, count)
        sent = chunks.rows(chunk, size - rows, size) if towards > 0 else chunks.rows(chunk, 0, rows)
        got = chunks.shifted(sent, towards * hop) if hop % chunks.ways else sent
        if end is not RING:
            got = chunks.chosen(_beyond(chunks, towards, hop), end, got)
        found.append(got)
        count, hop = count - rows, hop + 1
    return found


def _beyond(chunks: Chunks, towards: int, hop: int) -> Node:
    """Whether the neighbour ``hop`` ranks in front or behind would be beyond the end."""
    rank, flag = chunks.emit.axis_index(chunks.axis), Value(torch.bool, Layout(()))
    if towards > 0:
        return chunks.emit(aten.lt.Scalar, (rank, hop), flag)
    return chunks.emit(aten.ge.Scalar, (rank, chunks.ways - hop), flag)


def _zigzag(
    chunks: Chunks, own: list[Node], before: int, after: int, end: float | None
) -> list[tuple[list[Node], list[Node]]]:
    size = chunks.length(own[0])
    low, high = own
    outside: list[list[Node]] = [[], []]
    inside: list[list[Node]] = [[], []]
    first, last = (chunks.is_rank(0), chunks.is_rank(-1))
    if before:
        tails = [chunks.rows(chunk, size - before, size) for chunk in own]
        beyond: Any = tails[1] if end is RING else end
        outside[0] = [chunks.chosen(first, beyond, chunks.shifted(tails[0], 1))]
        inside[1] = [chunks.chosen(last, tails[0], chunks.shifted(tails[1], -1))]
    if after:
        heads = [chunks.rows(chunk, 0, after) for chunk in (low, high)]
        beyond = heads[0] if end is RING else end
        inside[0] = [chunks.chosen(last, heads[1], chunks.shifted(heads[0], -1))]
        outside[1] = [chunks.chosen(first, beyond, chunks.shifted(heads[1], 1))]
    return [(outside[0], inside[0]), (inside[1], outside[1])]
