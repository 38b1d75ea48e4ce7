"""Windows of a dim of positions: values that hold some of the positions only, in terms of values that hold all.

``logits[:, :-1]`` has one position less than there are, which no number of ranks divides. It is a window of a value of
all positions, and what is computed of it element by element is a window too. So all of that is computed of all
positions instead, each rank of its own, and the positions beside the window are left out at the end: they have the
ignored label, or are zeros in a sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.layout import Factor
from autopar.ir.node import Value, value
from autopar.mesh import Mesh

aten = torch.ops.aten
Factors = tuple[Factor, ...]
CPU = torch.device("cpu")  # emitted as the device of the rank


@dataclass(frozen=True)
class Window:
    """A value is the positions ``[offset, offset + length)`` of ``node``, which has all of them.

    The positions are a factor of ``dim`` of ``node``: behind ``outer`` elements, in front of ``inner`` ones.
    """

    node: fx.Node
    dim: int
    total: int
    offset: int
    length: int
    outer: int = 1
    inner: int = 1


def cut_dim(factors: Factors, sizes: tuple[int, ...], mesh: Mesh) -> list[Factors] | None:
    """``factors`` in groups of the given local sizes; None where no layout can say that.

    Each rank of an axis that splits a factor has whole rows of it: ``94@dp`` as (2, 47) on two ranks is ``2@dp 47``.
    """
    rest, groups = list(factors), list[Factors]()
    for size in sizes:
        taken: list[Factor] = []
        while rest and (size > 1 or rest[0].local(mesh) == 1):
            factor, local = rest[0], rest[0].local(mesh)
            ways = math.prod(mesh.size(axis) for axis in factor.axes)
            if size % local == 0:
                taken.append(rest.pop(0))
                size //= local
            elif local % size == 0 and factor.ratio == (1,) and not factor.mirrored and local * ways == factor.size:
                taken.append(Factor(size * ways, factor.axes))
                rest[0], size = Factor(local // size), 1
            else:
                return None
        groups.append(tuple(taken))
    return groups


def stretched(kind: Value, window: Window, dim: int, length: int, total: int, mesh: Mesh) -> Value | None:
    """The type of a value of which ``dim`` holds ``length`` positions, with ``total`` of them."""
    groups = cut_dim(kind.layout.dims[dim], (window.outer, length, window.inner), mesh)
    if groups is None or any(factor.axes for factor in groups[1]):
        return None
    dims = list(kind.layout.dims)
    dims[dim] = (*groups[0], Factor(total), *groups[2])
    return replace(kind, layout=replace(kind.layout, dims=tuple(dims)))


@dataclass(frozen=True)
class Spread:
    """A node with the positions as a dim of their own: ``place``, one of the ``count`` dims from ``dim`` on."""

    node: fx.Node
    dim: int
    place: int
    count: int


@dataclass(frozen=True)
class Writer:
    """Writes operators on windows in front of a node."""

    op: Builder
    mesh: Mesh
    known: dict[tuple[fx.Node, int, int], fx.Node]  # (node, dim, steps) -> it, rolled

    def spread(self, node: fx.Node, dim: int, sizes: tuple[int, int, int]) -> Spread | None:
        """``node`` with the positions, behind and in front of other elements, as a dim; ``sizes`` of all three."""
        kind = value(node)
        groups = cut_dim(kind.layout.dims[dim], sizes, self.mesh)
        if groups is None:
            return None
        middle = groups[1] or (Factor(1),)
        made = [group for group in (groups[0], middle, groups[2]) if group]
        found = self._reshaped(node, (*kind.layout.dims[:dim], *made, *kind.layout.dims[dim + 1 :]))
        return Spread(found, dim, dim + bool(groups[0]), len(made))

    def _reshaped(self, node: fx.Node, dims: tuple[Factors, ...]) -> fx.Node:
        kind = replace(value(node), layout=replace(value(node).layout, dims=dims))
        if kind.layout.dims == value(node).layout.dims:
            return node
        return self.op(aten.reshape.default, node, list(kind.layout.local_shape(self.mesh)), like=kind)

    def joined(self, node: fx.Node, spread: Spread) -> fx.Node:
        """``node``, which has the dims of ``spread``, with those that it made as one again."""
        dims, (start, stop) = value(node).layout.dims, (spread.dim, spread.dim + spread.count)
        merged = tuple(factor for group in dims[start:stop] for factor in group)
        return self._reshaped(node, (*dims[:start], merged, *dims[stop:]))

    def rolled(self, node: fx.Node, dim: int, by: int) -> fx.Node:
        steps = by % self._sizes(node)[dim]
        if not steps:
            return node
        if (node, dim, steps) not in self.known:
            self.known[node, dim, steps] = self.op(aten.roll.default, node, [by], [dim], like=node)
        return self.known[node, dim, steps]

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        return value(node).layout.local_shape(self.mesh)

    def filled(self, node: fx.Node, dim: int, start: int, stop: int, number: float) -> fx.Node:
        """``node`` with ``number`` at the positions along ``dim`` outside [start, stop)."""
        sizes = self._sizes(node)
        beyond = [
            self.op(compare, self._positions(len(sizes), dim, sizes[dim]), edge)
            for compare, edge, needed in ((aten.lt.Scalar, start, start > 0), (aten.ge.Scalar, stop, stop < sizes[dim]))
            if needed
        ]
        if not beyond:
            return node
        hidden = self.op(aten.bitwise_or.Tensor, *beyond) if len(beyond) == 2 else beyond[0]
        return self.op(aten.masked_fill.Scalar, node, hidden, number, like=node)

    def _positions(self, rank: int, dim: int, total: int) -> fx.Node:
        """0, 1, ... along ``dim`` of a tensor of so many dims, and size 1 along the others."""
        order = self.op(aten.arange.default, total, dtype=torch.int64, device=CPU)
        return self.op.reshape(order, *(total if d == dim else 1 for d in range(rank)))

    def within(self, rank: int, dim: int, total: int, start: int, stop: int) -> fx.Node:
        """Which positions are in [start, stop), along ``dim`` of a tensor of so many dims."""
        after = self.op(aten.ge.Scalar, self._positions(rank, dim, total), start)
        before = self.op(aten.lt.Scalar, self._positions(rank, dim, total), stop)
        return self.op(aten.bitwise_and.Tensor, after, before)

    def filled_beside(self, window: Window, number: float) -> fx.Node | None:
        """The node of a window with ``number`` at the positions outside it."""
        spread = self.spread(window.node, window.dim, (window.outer, window.total, window.inner))
        if spread is None:
            return None
        found = self.filled(spread.node, spread.place, window.offset, window.offset + window.length, number)
        return self.joined(found, spread)

    def moved(self, window: Window, offset: int) -> Window | None:
        """The same values as a window that begins at ``offset``."""
        if window.offset == offset:
            return window
        spread = self.spread(window.node, window.dim, (window.outer, window.total, window.inner))
        if spread is None:
            return None
        found = self.rolled(spread.node, spread.place, offset - window.offset)
        return replace(window, node=self.joined(found, spread), offset=offset)

    def widened(self, node: fx.Node, window: Window) -> Window | None:
        """A value of the positions of ``window`` only, computed apart from it, in place of the window's node.

        Positions outside repeat the first or the last one.
        """
        spread = self.spread(node, window.dim, (window.outer, window.length, window.inner))
        if spread is None:
            return None
        first, stop = -window.offset, window.total - window.offset
        order = self.op(aten.arange.start, first, stop, dtype=torch.int64, device=CPU)
        picks = self.op(aten.clamp.default, order, 0, window.length - 1)
        kind = _with_length(value(spread.node), spread.place, window.total)
        found = self.op(aten.index_select.default, spread.node, spread.place, picks, like=kind)
        return replace(window, node=self.joined(found, spread))

    def cut(self, window: Window, like: fx.Node) -> fx.Node | None:
        """The value that the window stands for, in the type of ``like``."""
        spread = self.spread(window.node, window.dim, (window.outer, window.total, window.inner))
        if spread is None:
            return None
        kind = _with_length(value(spread.node), spread.place, window.length)
        bounds = (spread.place, window.offset, window.offset + window.length, 1)
        found = self.op(aten.slice.Tensor, spread.node, *bounds, like=kind)
        return self._reshaped(found, value(like).layout.dims)


def _with_length(kind: Value, dim: int, length: int) -> Value:
    dims = list(kind.layout.dims)
    dims[dim] = (Factor(length),)
    return replace(kind, layout=replace(kind.layout, dims=tuple(dims)))


@dataclass(frozen=True)
class Place:
    """Where an operator has positions: in ``factor`` of its rule, behind ``outer`` elements, before ``inner`` ones."""

    factor: str
    outer: int
    inner: int

    def among(self, names: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, int]:
        """The elements in front of the positions, and those behind them, in a dim of these factors."""
        at = names.index(self.factor)
        before, after = (math.prod(sizes[name] for name in part) for part in (names[:at], names[at + 1 :]))
        return before * self.outer, self.inner * after


def place_of(names: tuple[str, ...], sizes: Mapping[str, int], window: Window) -> Place | None:
    """Where a dim with the factors ``names`` has the positions of ``window``; None where no one factor has them all."""
    passed = 1
    for name in names:
        outer, uneven = divmod(window.outer, passed)
        inner, rest = divmod(passed * sizes[name], window.outer * window.length)
        if inner and not uneven and not rest:
            return Place(name, outer, inner)
        passed *= sizes[name]
    return None
