"""On which DeviceMesh a tensor is held: all on one where DTensor can say it, since torch's functions ask for that.

The dims of a DeviceMesh are axes, or several merged to one. Where ``dp+sp`` splits parameters and neither axis splits
one by itself, they are one dim for all of them. Where that does not fit all (experts are split over ``ep``, other
parameters over ``dp+ep``) each axis is a dim, and ``dp+ep`` cuts along one after the other. A part that is uneven is no
such cut: that tensor is held on a DeviceMesh of its own, with a merged dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from autopar.communication.connect import Connection
from autopar.errors import IndivisibleError
from autopar.ir.layout import Layout
from autopar.mesh import axes_of
from autopar.weights.stored import Stored, stored


class Meshes:
    """The DeviceMeshes of the tensors of a stage; making one is collective, in the same order on all its ranks."""

    def __init__(self, plain: Connection) -> None:
        self._plain = self._usual = plain
        self._made: dict[tuple[str, ...], Connection] = {(): plain}

    @property
    def device(self) -> torch.device:
        return self._plain.comm.device

    def prefer(self, layouts: Iterable[Layout]) -> None:
        """Hold tensors of ``layouts`` on one DeviceMesh as far as possible."""
        groups = {group for layout in layouts for group in layout.groups}
        fit = all(set(axes_of(one)).isdisjoint(axes_of(other)) for one, other in itertools.combinations(groups, 2))
        self._usual = self._merged(groups) if fit else self._plain

    def of(self, layout: Layout, name: str) -> tuple[Stored, Connection]:
        """How a tensor of ``layout`` is held, and on which mesh. Raises IndivisibleError where DTensor has no such."""
        try:
            return stored(layout, self._usual.mesh, self._usual.dims, name), self._usual
        except IndivisibleError:
            own = self._merged(layout.groups)
            if own is self._usual:
                raise
            return stored(layout, own.mesh, own.dims, name), own

    def _merged(self, groups: Iterable[str]) -> Connection:
        several = tuple(sorted({group for group in groups if len(axes_of(group)) > 1}))
        if several not in self._made:
            self._made[several] = self._plain.with_merged(*several)
        return self._made[several]
