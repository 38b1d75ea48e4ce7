"""All elements of a condition as rows: tensors spread over them, and rows added up or put back where it is true.

The condition has dims ``(d0, d1, ...)``. A *column* is one of them: ``torch.where`` gives for each selected row its
position along each. A tensor ``x`` that is indexed by columns becomes rows ``(N, ...)``: one for each element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value

aten = torch.ops.aten
HERE = torch.device("cpu")  # emitted as the device of the rank


@dataclass(frozen=True)
class Grid:
    """The elements of ``condition`` as rows; ``order``: its dims, the first of which changes slowest."""

    condition: fx.Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return value(self.condition).shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in the order of the rows."""
        return tuple(self.shape[column] for column in self.order)

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def spans(self, shape: Sequence[int], places: Sequence[tuple[int, int]]) -> bool:
        """Whether a tensor has exactly the positions of the columns; ``places``: (its dim, column)."""
        columns = {column for _, column in places}
        return len(columns) == len(places) and all(shape[dim] == self.shape[column] for dim, column in places)


@dataclass(frozen=True)
class Selected:
    """What a node of the traced graph is: a table of positions, one column of it, or rows along ``dim``."""

    grid: Grid
    kind: str  # "positions" (rows, columns), "column" or "rows"
    dim: int = 0  # of the rows; of positions, the dim of the columns
    column: int = 0


def positions(op: Builder, grid: Grid, column: int) -> fx.Node:
    """The position (N,) of each row along one dim of the condition."""
    at = grid.order.index(column)
    inner = math.prod(grid.sizes[at + 1 :])
    found = op(aten.arange.default, grid.rows, dtype=torch.int64, device=HERE)
    found = op(aten.floor_divide.default, found, inner) if inner > 1 else found
    return op(aten.remainder.Scalar, found, grid.sizes[at]) if at else found


def gather(op: Builder, grid: Grid, source: fx.Node, places: Sequence[tuple[int, int]], dim: int) -> fx.Node:
    """``source`` indexed by columns, with the rows along ``dim``; ``places``: (dim of source, column)."""
    ordered = sorted(places, key=lambda place: grid.order.index(place[1]))
    front = [place for place, _ in ordered]
    rest = [place for place in range(len(value(source).shape)) if place not in front]
    inner = [value(source).shape[place] for place in rest]
    columns = tuple(column for _, column in ordered)
    rows = _permuted(op, source, [*front, *rest])
    if columns == grid.order[: len(columns)]:
        copies = math.prod(grid.sizes[len(columns) :])
        rows = op.reshape(rows, grid.rows // max(copies, 1), *inner)
        rows = op(aten.repeat_interleave.self_int, rows, copies, 0) if copies != 1 else rows
    else:
        rows = op.reshape(rows, *(grid.shape[c] if c in columns else 1 for c in grid.order), *inner)
        rows = op.reshape(op(aten.expand.default, rows, [*grid.sizes, *inner]), grid.rows, *inner)
    others = list(range(1, len(inner) + 1))
    return _permuted(op, rows, [*others[:dim], 0, *others[dim:]])


def filled(op: Builder, grid: Grid, rows: fx.Node, dim: int, fill: float) -> fx.Node:
    """``rows``, along ``dim``, with ``fill`` in place of those that were not selected: no gradient goes to them."""
    others = op(aten.logical_not.default, _selected(op, grid, len(value(rows).shape), dim))
    return op(aten.masked_fill.Scalar, rows, others, fill)


def count(op: Builder, grid: Grid) -> fx.Node:
    """How many rows are selected, an int64 scalar."""
    return op(aten.sum.default, _marks(op, grid))


def sums(op: Builder, grid: Grid, rows: fx.Node, dim: int, columns: Sequence[int]) -> fx.Node:
    """The sums of the selected rows for each position along ``columns``, which stand in place of the rows' ``dim``."""
    shape = value(rows).shape
    kept = filled(op, grid, rows, dim, 0)
    parts = op.reshape(kept, *shape[:dim], *grid.sizes, *shape[dim + 1 :])
    missing = [dim + at for at, column in enumerate(grid.order) if column not in columns]
    total = op(aten.sum.dim_IntList, parts, missing) if missing else parts
    return _in_order(op, grid, total, dim, columns)


def replaced(op: Builder, grid: Grid, rows: fx.Node, columns: Sequence[int], target: fx.Node) -> fx.Node:
    """``target`` with the selected rows in place of its own; at most one is selected for each position."""
    taken = op.reshape(_selected(op, grid, 1, 0), *grid.sizes)
    for at in reversed(range(len(grid.order))):
        if grid.order[at] not in columns:
            taken = op(aten.any.dim, taken, at)
    taken = _in_order(op, grid, taken, 0, columns)
    shape = value(taken).shape
    taken = op.reshape(taken, *shape, *[1] * (len(value(target).shape) - len(shape)))
    return op(aten.where.self, taken, sums(op, grid, rows, 0, columns), target)


def _selected(op: Builder, grid: Grid, rank: int, dim: int) -> fx.Node:
    """Whether each row is selected, to be broadcast to rows along ``dim`` of a tensor of ``rank`` dims."""
    return op.reshape(_permuted(op, _marks(op, grid), grid.order), *[1] * dim, grid.rows, *[1] * (rank - dim - 1))


def _marks(op: Builder, grid: Grid) -> fx.Node:
    condition = grid.condition
    return condition if value(condition).dtype is torch.bool else op(aten.ne.Scalar, condition, 0)


def _in_order(op: Builder, grid: Grid, source: fx.Node, dim: int, columns: Sequence[int]) -> fx.Node:
    """The dims from ``dim`` on, so far in the order of the rows, in the order of ``columns``."""
    now = [column for column in grid.order if column in columns]
    rank = len(value(source).shape)
    own = [dim + now.index(column) for column in columns]
    return _permuted(op, source, [*range(dim), *own, *range(dim + len(own), rank)])


def _permuted(op: Builder, source: fx.Node, order: Sequence[int]) -> fx.Node:
    shape = value(source).shape
    kept = [dim for dim in order if shape[dim] != 1]
    if kept == sorted(kept):  # the elements stay in their order
        return op.reshape(source, *(shape[dim] for dim in order))
    return op(aten.permute.default, source, list(order))
