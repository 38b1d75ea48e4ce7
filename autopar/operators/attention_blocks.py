"""The blocks in which a part of an attention is computed: none where a formula hides all, few where it hides nothing.

A sequence is cut into ``ways`` parts of neighbours, or ``mirrored``: into 2 * ways chunks, of which rank r has r and
2 * ways - 1 - r, so that a causal mask leaves each rank equal work (the zig-zag of ring-flash-attention, Zhu 2024).
At ``step`` s >= 0 of a ring a rank holds the keys of rank (rank - s) % ways; at step -1 all keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from autopar.operators.predicates import Before, Chunk, Compare, Flag, Formula, Vectors, Within, parse

MOST_ROWS, FEWEST_ROWS = 1024, 256  # of a block that a formula hides in part
MOST_COLUMNS = 4096
SMALL = 2**18  # scores that are not worth a second call


@dataclass(frozen=True)
class Span:
    """Neighbouring positions: where they are in the tensor of a part, and in the whole sequence."""

    local: int
    place: int
    length: int

    @property
    def positions(self) -> range:
        return range(self.place, self.place + self.length)

    @property
    def here(self) -> slice:
        """The dim of the part."""
        return slice(self.local, self.local + self.length)

    @property
    def whole(self) -> slice:
        """The dim of the whole sequence."""
        return slice(self.place, self.place + self.length)

    def is_before(self, other: Span) -> bool:
        """Whether ``other`` follows in the part."""
        return self.local + self.length == other.local

    def overlaps(self, other: Span) -> bool:
        """In the part."""
        return self.local < other.local + other.length and other.local < self.local + self.length

    def with_next(self, other: Span) -> Span:
        return replace(self, length=self.length + other.length)

    def between(self, start: int, stop: int) -> Span:
        """Those of the positions ``start <= position < stop``."""
        start, stop = (min(max(edge, self.place), self.place + self.length) for edge in (start, stop))
        return Span(self.local + start - self.place, start, max(stop - start, 0))


@dataclass(frozen=True)
class Block:
    """Rows times columns; ``rest`` is what the formula still hides there, unless it is just ``causal``."""

    rows: Span
    columns: Span
    rest: Formula
    causal: bool = False

    @property
    def scores(self) -> int:
        """The (row, column) pairs; those above the diagonal of a causal square are not computed."""
        rows, columns = self.rows.length, self.columns.length
        return rows * (rows + 1) // 2 if self.causal else rows * columns


def spans(length: int, rank: int, ways: int, mirrored: bool) -> tuple[Span, ...]:
    """The positions of ``rank``; ``length`` is that of its part."""
    if not mirrored or ways == 1:
        return (Span(0, rank * length, length),)
    half = length // 2
    return Span(0, rank * half, half), Span(half, (2 * ways - 1 - rank) * half, half)


def blocks(
    formula: Formula, rows: tuple[Span, ...], columns: tuple[Span, ...], vectors: Vectors | None = None
) -> Iterator[Block]:
    """The blocks that cover all pairs that ``formula`` leaves; ``vectors`` only where they can be read cheaply."""
    for left, right in itertools.product(rows, columns):
        rest = formula.rest(left.positions, right.positions, vectors) if left.length and right.length else None
        if rest is None:
            continue
        if not rest.clauses:
            yield Block(left, right, rest)
        elif _is_causal(rest):
            yield from _triangle(rest, left, right)
        else:
            for some in _row_blocks(rest, left):
                yield from _stripe(rest, some, right, vectors)


def joined(found: Iterable[Block]) -> list[Block]:
    """Fewer blocks where neighbours in the part hide nothing, or just what comes later.

    Neighbours in the part need not be so in the whole: only ``here`` means something of the spans that are joined.
    """
    done: list[Block] = []
    for block in found:
        one: Block | None = block
        while one:
            block, one = one, None
            if done and (one := _side_by_side(done[-1], block)):
                done.pop()
            elif len(done) > 1 and (one := _larger_square(done[-2], done[-1], block)):
                del done[-2:]
        done.append(block)
    return done


def _side_by_side(block: Block, after: Block) -> Block | None:
    if block.causal or after.causal or block.rest.clauses or after.rest.clauses:
        return None
    if block.rows.here == after.rows.here and block.columns.is_before(after.columns):
        return replace(block, columns=block.columns.with_next(after.columns))
    if block.columns.here == after.columns.here and block.rows.is_before(after.rows):
        return replace(block, rows=block.rows.with_next(after.rows))
    return None


def _larger_square(first: Block, between: Block, last: Block) -> Block | None:
    """The causal square of two on its diagonal and what is seen between them."""
    diagonal = first.causal and last.causal and not between.causal and not between.rest.clauses
    below = between.rows.here == last.rows.here and between.columns.here == first.columns.here
    if diagonal and below and first.rows.is_before(last.rows) and first.columns.is_before(last.columns):
        return replace(first, rows=first.rows.with_next(last.rows), columns=first.columns.with_next(last.columns))
    return None


def _is_causal(rest: Formula) -> bool:
    return len(rest.clauses) == 1 and len(rest.clauses[0]) == 1 and isinstance(rest.clauses[0][0], Before)


def _triangle(rest: Formula, rows: Span, columns: Span) -> Iterator[Block]:
    """Causality alone: a square on the diagonal, the full rows below it, the full columns left of it."""
    ((term,),) = rest.clauses
    assert isinstance(term, Before)
    low, high = columns.place - term.offset, columns.place + columns.length - term.offset  # rows of the diagonal
    square, below = rows.between(low, high), rows.between(high, rows.place + rows.length)
    nothing = Formula()
    if below.length:
        yield Block(below, columns, nothing)
    if square.length:
        first = square.place + term.offset
        before = columns.between(columns.place, first)
        if before.length:
            yield Block(square, before, nothing)
        yield Block(square, columns.between(first, first + square.length), nothing, causal=True)


def _row_blocks(rest: Formula, rows: Span) -> Iterator[Span]:
    """Blocks no higher than a window is wide: half of a higher one would be hidden."""
    widths = [t.width if isinstance(t, Within) else t.size for t in rest.terms if isinstance(t, (Within, Chunk))]
    height = min(MOST_ROWS, max(FEWEST_ROWS, *widths)) if widths else MOST_ROWS
    for start in range(rows.place, rows.place + rows.length, height):
        yield rows.between(start, start + height)


def _stripe(rest: Formula, rows: Span, columns: Span, vectors: Vectors | None) -> Iterator[Block]:
    """One block of rows: the columns cut where a term changes, neighbours with the same rest joined."""
    edges = {columns.place, columns.place + columns.length}
    edges |= {edge for term in rest.terms for edge in term.edges(rows.positions) if edge in columns.positions}
    if vectors is not None and any(isinstance(term, (Compare, Flag)) for term in rest.terms):
        edges |= set(range(columns.place, columns.place + columns.length, MOST_ROWS))
    waiting: Block | None = None
    for start, stop in itertools.pairwise(sorted(edges)):
        some = columns.between(start, stop)
        left = rest.rest(rows.positions, some.positions, vectors)
        if left is None:
            continue
        block = Block(rows, some, left)
        joined = waiting and _joined(waiting, block, rest, vectors)
        if waiting and not joined:
            yield from _finished(waiting)
        waiting = joined or block
    if waiting:
        yield from _finished(waiting)


def _joined(block: Block, after: Block, formula: Formula, vectors: Vectors | None) -> Block | None:
    """One block for two neighbours, where they hide the same or are small."""
    adjacent = block.columns.place + block.columns.length == after.columns.place
    length = block.columns.length + after.columns.length
    if not adjacent or (block.rest != after.rest and length * block.rows.length > SMALL):
        return None
    columns = replace(block.columns, length=length)
    rest = block.rest
    if rest != after.rest:
        found = formula.rest(block.rows.positions, columns.positions, vectors)
        assert found is not None
        rest = found
    return replace(block, columns=columns, rest=rest)


def _finished(block: Block) -> Iterator[Block]:
    """A causal square is one for the kernel; a wide block with a formula is cut, since its mask is held."""
    if _is_causal(block.rest) and block.rows.length == block.columns.length:
        ((term,),) = block.rest.clauses
        assert isinstance(term, Before)
        if block.rows.place + term.offset == block.columns.place:
            yield replace(block, rest=Formula(), causal=True)
            return
    first, last = block.columns.place, block.columns.place + block.columns.length
    for start in range(first, last, MOST_COLUMNS) if block.rest.clauses else (first,):
        yield replace(block, columns=block.columns.between(start, start + MOST_COLUMNS if block.rest.clauses else last))


@lru_cache(maxsize=4096)
def tile_pairs(where: str, rank: int, step: int, ways: int, mirrored: bool, queries: int, keys: int) -> int:
    """The (row, column) scores that ``rank`` computes at ``step``, of sequences of ``queries`` and ``keys`` in all.

    Vectors are not known, so this is the most that a formula with them leaves.
    """
    rows = spans(queries // ways, rank, ways, mirrored)
    columns = spans(keys // ways, (rank - step) % ways, ways, mirrored) if step >= 0 else spans(keys, 0, 1, False)
    return sum(block.scores for block in blocks(parse(where), rows, columns))
