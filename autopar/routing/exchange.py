"""The rows of one region on their way to the ranks of their experts and back: what is common to all ways of sending."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Split
from autopar.ir.node import Value, set_values, value, values
from autopar.mesh import Mesh, axes_of
from autopar.operators.experts import EXPERT_LINEAR
from autopar.routing.deferring import defer_gather
from autopar.routing.placing import CannotPlace
from autopar.routing.regions import RESHAPES, Region

Rows = tuple[Factor, ...]


def check_tokens(region: Region, axis: str) -> None:
    """Raise CannotPlace where the tokens of a region are the same along several axes of the group, but not all."""
    alike = [part for part in axes_of(axis) if part not in value(region.ids).layout.axes]
    if 1 < len(alike) < len(axes_of(axis)):
        raise CannotPlace(f"its tokens are the same on all ranks of {' and '.join(alike)}")


@dataclass
class Exchange(ABC):
    """The rewriting of one region, whose rows go to the ranks of ``axis``.

    ``entered``: the axes whose ranks used the weights on other data. Where ``axis`` has ``tp``, whose ranks have the
    same tokens, each of them takes its part, and all get the results of all. On an axis of one rank the experts are
    whole.
    """

    mesh: Mesh
    axis: str
    region: Region
    entered: frozenset[str] = frozenset()
    order_of_experts: tuple[int, ...] = ()  # as the ranks have them; empty: 0, 1, 2, ...
    layer: str = ""  # under which the load is noted; empty: it is not
    sent: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a value of the tokens -> what has arrived of it

    def write(self) -> None:
        """Send the rows of the region to their experts, and the results back, in the graph."""
        outside = {node: value(node) for node in self.region.given}
        op = Builder(before=self.region.inside[0])
        self.write_route(op, self._shared_out(op, self.region.ids))
        self.sent = {source: self._sent(source) for source in self.region.taken}
        for node in self.region.inside:
            set_values(node, *(with_first(kind, self.arrived) for kind in values(node)))
            for source, arrived in self.sent.items():
                node.replace_input_with(source, arrived)
            self.write_inside(node)
        for node, kind in outside.items():
            self._give_back(node, kind)

    @abstractmethod
    def write_route(self, op: Builder, ids: fx.Node) -> None:
        """Where rows go, by the ids of a rank's own rows."""

    @property
    @abstractmethod
    def arrived(self) -> Rows:
        """The rows of all ranks between the exchanges."""

    @abstractmethod
    def send(self, op: Builder, rows: fx.Node) -> fx.Node:
        """The rows of experts, of a rank's own tokens, or of one row for each of its ids."""

    @abstractmethod
    def fetch(self, op: Builder, rows: fx.Node, kind: Value) -> fx.Node:
        """The rows of a rank's own ids, of type ``kind``, of those of experts."""

    @abstractmethod
    def write_product(self, node: fx.Node) -> None:
        """Let a product of the region take the rows that have arrived."""

    @abstractmethod
    def write_vector(self, node: fx.Node) -> None:
        """Let a vector of the region's experts be picked for the rows that have arrived."""

    def write_inside(self, node: fx.Node) -> None:
        """Let a node take the rows that have arrived."""
        args: Any = node.args
        if node.target is EXPERT_LINEAR:
            self.write_product(node)
        elif node in self.region.vectors:
            self.write_vector(node)
        elif node.target in RESHAPES:
            node.args = (args[0], [-1, *args[1][1:]], *args[2:])

    # ------------------------------------------------------------ experts

    @property
    def placed(self) -> list[list[int]]:
        """The last argument of an operator that asks for places: none where they are in order."""
        return [self._places] if self.order_of_experts else []

    @property
    def _places(self) -> list[int]:
        """The slot of each expert: the ranks have ``own`` slots each, one after the other."""
        order = self.order_of_experts or range(self.region.experts)
        return sorted(range(self.region.experts), key=list(order).__getitem__)

    def noted(self, op: Builder, numbers: fx.Node, counts: fx.Node) -> fx.Node:
        """``numbers``, one for each row of a rank, behind what notes the load, if that is asked for."""
        if not self.layer:
            return numbers
        ranks = self.mesh.merged((*self.others, *self.group) or (self.axis,))
        given = (ranks, counts, self.layer, self.axis, self._places)
        return op(comm.OPS.tally.default, numbers, *given, like=numbers)

    # ------------------------------------------------------------ rows

    @property
    def group(self) -> tuple[str, ...]:
        """The axis as it splits a dim; none where the experts are whole on every rank."""
        return (self.axis,) if self.ways > 1 else ()

    @property
    def ways(self) -> int:
        return self.mesh.size(self.axis)

    @cached_property
    def _token_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have other tokens."""
        return value(self.region.ids).layout.groups

    @cached_property
    def shared(self) -> str:
        """The axis of the group whose ranks have the same tokens, or all its axes; empty if there is none."""
        split = value(self.region.ids).layout.axes
        alike = [axis for group in self.group for axis in axes_of(group) if axis not in split]
        return self.mesh.merged(alike) if alike else ""

    @property
    def _is_entered(self) -> bool:
        """Whether the ranks of ``shared`` used the weights on other data."""
        return not self.entered.isdisjoint(axes_of(self.shared))

    @property
    def others(self) -> tuple[str, ...]:
        """The further axes whose ranks have other rows."""
        own = [axis for group in self.group for axis in axes_of(group)]
        return tuple(axis for axis in self._token_axes if axis not in own)

    @property
    def count(self) -> int:
        """The rows of one rank, one for each of its ids, after they are shared out."""
        count = self._filled_up(value(self.region.ids).layout.local_shape(self.mesh)[0])
        return count // self.mesh.size(self.shared) if self.shared else count

    def _filled_up(self, rows: int) -> int:
        """``rows``, some for each token, with those of so many tokens more that ``shared`` divides the tokens."""
        if not self.shared:
            return rows
        sources = (*self.region.taken, self.region.ids)
        tokens = min(value(node).layout.local_shape(self.mesh)[0] for node in sources)
        return rows // tokens * (tokens + -tokens % self.mesh.size(self.shared))

    @property
    def own_rows(self) -> Rows:
        """The rows of all ranks outside of the exchanges: one for each id."""
        return self.of_ranks(self.count, (*self.others, *self.group))

    def of_ranks(self, count: int, axes: tuple[str, ...], *, ragged: bool = False) -> Rows:
        """A dim of which each rank has ``count``."""
        return (Factor(count * math.prod(map(self.mesh.size, axes)), axes, ragged=ragged),)

    # ------------------------------------------------------------ to experts and back

    def _sent(self, source: fx.Node) -> fx.Node:
        first = next(node for node in self.region.inside if source in node.all_input_nodes)
        op = Builder(before=first)
        return self.send(op, self._shared_out(op, source))

    def _shared_out(self, op: Builder, source: fx.Node) -> fx.Node:
        """This rank's part of rows that are the same on all ranks of ``shared``."""
        if not self.shared:
            return source
        kind, ways = value(source), self.mesh.size(self.shared)
        length = self._filled_up(kind.layout.local_shape(self.mesh)[0])
        missing = length - kind.layout.local_shape(self.mesh)[0]
        if missing:  # zeros: the first expert does them, and what it gives is left out
            amounts = [*[0, 0] * (len(kind.shape) - 1), 0, missing]
            filled = with_first(kind, self.of_ranks(length, self._token_axes))
            source = op(torch.ops.aten.constant_pad_nd.default, source, amounts, like=filled)
        part = with_first(kind, self.of_ranks(length // ways, (*self._token_axes, self.shared)))
        cut = comm.OPS.split_replicated if self._is_entered else comm.OPS.split
        return op(cut.default, source, *comm.where(Split(0), self.shared, ways, length), like=part)

    def _give_back(self, node: fx.Node, kind: Value) -> None:
        inside = set(self.region.inside)
        users = [user for user in node.users if user not in inside]
        op = Builder(after=node)
        part = with_first(kind, self.of_ranks(self.count, (*self._token_axes, self.shared))) if self.shared else kind
        found = self.fetch(op, node, part)
        if self.shared:
            join = comm.OPS.all_gather if self._is_entered else comm.OPS.all_gather_invariant
            ways, length = self.mesh.size(self.shared), kind.layout.local_shape(self.mesh)[0]
            filled = with_first(kind, self.of_ranks(self.count * ways, self._token_axes))
            filled = kind if self.count * ways == length else filled
            found = op(join.default, found, *comm.where(Split(0), self.shared, ways, self.count * ways), like=filled)
            gathered = found
            if self.count * ways != length:
                found = op(torch.ops.aten.slice.Tensor, found, 0, 0, length, like=kind)
        for user in users:
            user.replace_input_with(node, found)
        if self.shared and gathered is found:
            defer_gather(found, self.mesh)


def with_first(kind: Value, rows: Rows) -> Value:
    """``kind`` with another dim 0."""
    return replace(kind, layout=replace(kind.layout, dims=(rows, *kind.layout.dims[1:])))


def items(op: Builder, node: fx.Node, *names: str) -> tuple[fx.Node, ...]:
    """The results of a node that has several."""
    return tuple(op(operator.getitem, node, position, name=name) for position, name in enumerate(names))
