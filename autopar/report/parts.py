"""Tensors as rectangles: which part of its two sides belongs to which positions on the axes of the mesh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from autopar.ir.layout import Layout, runs
from autopar.ir.node import Value
from autopar.ir.traffic import bytes_of
from autopar.mesh import Mesh, axes_of
from autopar.report.document import Drawing, DrawnDim, Segment

MOST_SEGMENTS = 64  # of one side; more than a pixel or two each would not have


def drawing(kind: Value, mesh: Mesh) -> Drawing:
    """The rectangle of a parameter or a buffer; ``mesh``: without ``pp``."""
    layout = kind.layout
    return Drawing(
        shape=layout.shape,
        local_shape=layout.local_shape(mesh),
        dtype=str(kind.dtype).removeprefix("torch."),
        layout=str(layout),
        bytes=bytes_of(kind),
        rank_bytes=bytes_of(kind, mesh),
        dims=tuple(_side(layout, dim, mesh) for dim in _drawn(layout)),
        axes=tuple(axis for axis in mesh.names if axis in layout.axes),
    )


def _drawn(layout: Layout) -> list[int]:
    """The two dims to be drawn, in order: split ones first, then the larger ones."""
    split = [dim for dim, factors in enumerate(layout.dims) if any(factor.axes for factor in factors)]
    others = sorted(set(range(len(layout.dims))) - set(split), key=lambda dim: (-layout.shape[dim], dim))
    return sorted([*split, *others][:2])


def _side(layout: Layout, dim: int, mesh: Mesh) -> DrawnDim:
    groups = {axis for factor in layout.dims[dim] for group in factor.axes for axis in axes_of(group)}
    axes = tuple(axis for axis in mesh.names if axis in groups)
    owners: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for positions, start, stop in _owned(layout, dim, axes, mesh):
        owners.setdefault((start, stop), []).append(positions)
    segments = [Segment(*where, tuple(here)) for where, here in sorted(owners.items())]
    return DrawnDim(
        dim, layout.shape[dim], axes, tuple(segments[:MOST_SEGMENTS]), max(0, len(segments) - MOST_SEGMENTS)
    )


def _owned(layout: Layout, dim: int, axes: tuple[str, ...], mesh: Mesh) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(positions on ``axes``, first index, one past the last) of each run of neighbouring indices with one owner."""
    for positions in itertools.product(*(range(mesh.size(axis)) for axis in axes)):
        indices = layout.indices(dim, dict(zip(axes, positions)), mesh)
        found = [(0, layout.shape[dim])] if indices is None else runs(indices)
        for start, length in found:
            yield positions, start, start + length
