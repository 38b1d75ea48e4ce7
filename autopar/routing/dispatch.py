"""The rows of one region on their way: to the ranks of their experts, as many as there are, and back.

Nothing is dropped. A rank knows at run time only how many rows arrive; what is written has the number of a balanced
load, marked as ragged. (Gale et al. 2023, MegaBlocks; the exchange: Rajbhandari et al. 2022, DeepSpeed-MoE, section 5.)
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Layout, Split
from autopar.ir.node import Value, set_values, value, values
from autopar.mesh import Mesh, axes_of
from autopar.operators.experts import EXPERT_LINEAR
from autopar.operators.routing import COLUMNS, PERMUTE_ROWS, RECEIVED_IDS, ROUTE_ROWS, ROW_SIZES, own_experts
from autopar.routing.deferring import defer_gather
from autopar.routing.placing import CannotPlace
from autopar.routing.regions import RESHAPES, Region

aten = torch.ops.aten


def check_tokens(region: Region, axis: str) -> None:
    """Raise CannotPlace where the tokens of a region are the same along more than one axis of the group."""
    alike = [part for part in axes_of(axis) if part not in value(region.ids).layout.axes]
    if len(alike) > 1:
        raise CannotPlace(f"its tokens are the same on all ranks of {' and '.join(alike)}")


@dataclass
class Dispatch:
    """The rewriting of one region, whose rows go to the ranks of ``axis``.

    ``entered``: the axes whose ranks used the weights on other data. Where ``axis`` has ``tp``, whose ranks have the
    same tokens, each of them takes its part, and all get the results of all.
    """

    mesh: Mesh
    axis: str
    region: Region
    entered: frozenset[str] = frozenset()
    order_of_experts: tuple[int, ...] = ()  # as the ranks have them; empty: 0, 1, 2, ...
    layer: str = ""  # under which the load is noted; empty: it is not
    sizes: tuple[fx.Node, ...] = ()  # rows that are sent to each rank, and that come from it
    sent: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a value of the tokens -> what has arrived of it

    def write(self) -> None:
        """Send the rows of the region to their experts, and the results back, in the graph."""
        outside = {node: value(node) for node in self.region.given}
        self._write_route(Builder(before=self.region.inside[0]))
        self.sent = {source: self._dispatched(source) for source in self.region.taken}
        for node in self.region.inside:
            set_values(node, *(self._with_rows(kind, ragged=True) for kind in values(node)))
            self._write_inside(node)
        for node, kind in outside.items():
            self._give_back(node, kind)

    # ------------------------------------------------------------ rows

    @cached_property
    def _token_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have other tokens."""
        return value(self.region.ids).layout.groups

    @cached_property
    def shared(self) -> str:
        """The axis of the group whose ranks have the same tokens; empty if there is none."""
        split = value(self.region.ids).layout.axes
        return next((axis for axis in axes_of(self.axis) if axis not in split), "")

    @property
    def _others(self) -> tuple[str, ...]:
        """The further axes whose ranks have other rows."""
        return tuple(axis for axis in self._token_axes if axis not in axes_of(self.axis))

    @property
    def _count(self) -> int:
        """The rows of one rank, one for each of its ids, after they are shared out."""
        count = value(self.region.ids).layout.local_shape(self.mesh)[0]
        return count // self.mesh.size(self.shared) if self.shared else count

    def _rows(self, *, ragged: bool = False) -> tuple[Factor, ...]:
        """The rows of all ranks: one for each id."""
        return self._of_ranks(self._count, (*self._others, self.axis), ragged=ragged)

    def _of_ranks(self, count: int, axes: tuple[str, ...], *, ragged: bool = False) -> tuple[Factor, ...]:
        """A dim of which each rank has ``count``."""
        return (Factor(count * math.prod(map(self.mesh.size, axes)), axes, ragged=ragged),)

    def _with_rows(self, kind: Value, *, ragged: bool) -> Value:
        return _with_first(kind, self._rows(ragged=ragged))

    def _write_route(self, op: Builder) -> None:
        """The order of the rows, how many go to each rank and come from it, and the ids of those that arrive."""
        ways, experts = self.mesh.size(self.axis), self.region.experts
        own = own_experts(experts, ways)
        numbers = Value(torch.int64, Layout((self._rows(),)))
        fibres = tuple(Factor(self.mesh.size(axis), (axis,)) for axis in self._others)
        here, whole, bins = Factor(ways, (self.axis,)), Factor(ways), (Factor(own + 1),)
        table = Value(torch.int64, Layout(((*fibres, here), (whole,), bins)))
        swapped = Value(torch.int64, Layout(((*fibres, whole), (here,), bins)))
        sizes = Value(torch.int64, Layout(((*fibres, here, whole),)))
        ids = self._shared_out(op, self.region.ids)
        placed = [self._places] if self.order_of_experts else []
        route = op(ROUTE_ROWS, ids, experts, ways, *placed, like=(numbers, numbers, table), name="route")
        self.order, self.inverse, counts = _items(op, route, "order", "inverse", "counts")
        if self.layer:
            self.order = self._noted(op, counts)
        swap = (self.axis, ways, [0, 1, 1], [1, 1, 1])
        received = op(comm.OPS.all_to_all.default, counts, *swap, like=swapped, name="received")
        both = op(ROW_SIZES, counts, received, like=(sizes, sizes), name="sizes")
        self.sizes = _items(op, both, "send", "receive")
        rows = numbers.layout.local_shape(self.mesh)[0]
        self.ids = op(RECEIVED_IDS, received, rows, like=self._with_rows(numbers, ragged=True))

    def _noted(self, op: Builder, counts: fx.Node) -> fx.Node:
        """The order, behind what notes the load."""
        ranks = self.mesh.merged((*self._others, self.axis))
        given = (ranks, counts, self.layer, self.axis, self._places)
        return op(comm.OPS.tally.default, self.order, *given, like=self.order)

    @property
    def _places(self) -> list[int]:
        """The slot of each expert: the ranks have ``own`` slots each, one after the other."""
        order = self.order_of_experts or range(self.region.experts)
        return sorted(range(self.region.experts), key=list(order).__getitem__)

    def _dispatched(self, source: fx.Node) -> fx.Node:
        op = Builder(before=self._first_user(source))
        kind = self._with_rows(value(source), ragged=False)
        picked = op(PERMUTE_ROWS, self._shared_out(op, source), self.order, self.inverse, like=kind)
        arrived = self._with_rows(kind, ragged=True)
        return op(comm.OPS.dispatch_rows.default, picked, *self._ways, *self.sizes, like=arrived)

    def _shared_out(self, op: Builder, source: fx.Node) -> fx.Node:
        """This rank's part of rows that are the same on all ranks of ``shared``."""
        if not self.shared:
            return source
        kind, ways = value(source), self.mesh.size(self.shared)
        length = kind.layout.local_shape(self.mesh)[0]
        part = _with_first(kind, self._of_ranks(length // ways, (*self._token_axes, self.shared)))
        cut = comm.OPS.split_replicated if self.shared in self.entered else comm.OPS.split
        return op(cut.default, source, *comm.where(Split(0), self.shared, ways, length), like=part)

    def _first_user(self, source: fx.Node) -> fx.Node:
        return next(node for node in self.region.inside if source in node.all_input_nodes)

    @property
    def _ways(self) -> tuple[str, int]:
        return self.axis, self.mesh.size(self.axis)

    def _give_back(self, node: fx.Node, kind: Value) -> None:
        inside = set(self.region.inside)
        users = [user for user in node.users if user not in inside]
        op, rows = Builder(after=node), self._with_rows(kind, ragged=False)
        home = op(comm.OPS.return_rows.default, node, *self._ways, *reversed(self.sizes), like=rows)
        part = _with_first(kind, self._of_ranks(self._count, (*self._token_axes, self.shared))) if self.shared else kind
        found = op(PERMUTE_ROWS, home, self.inverse, self.order, like=part)
        if self.shared:
            join = comm.OPS.all_gather if self.shared in self.entered else comm.OPS.all_gather_invariant
            ways = self.mesh.size(self.shared)
            found = op(join.default, found, *comm.where(Split(0), self.shared, ways, self._count * ways), like=kind)
        for user in users:
            user.replace_input_with(node, found)
        if self.shared:
            defer_gather(found, self.mesh)

    def _write_inside(self, node: fx.Node) -> None:
        """Let a node take the rows that have arrived, however many there are."""
        for source, arrived in self.sent.items():
            node.replace_input_with(source, arrived)
        args: Any = node.args
        if node.target is EXPERT_LINEAR:
            node.args = (*args[:2], self.ids)
        elif node in self.region.vectors:
            node.args = (args[0], [self.ids, *args[1][1:]])
        elif node.target in RESHAPES:
            node.args = (args[0], [-1, *args[1][1:]], *args[2:])
        elif node.target is aten.slice.Tensor:
            dim, start, end, *step = args[1:]  # in canonical form
            node.target, node.args = COLUMNS, (args[0], dim, start, end, *(step or [1]))


def _with_first(kind: Value, rows: tuple[Factor, ...]) -> Value:
    """``kind`` with another dim 0."""
    return replace(kind, layout=replace(kind.layout, dims=(rows, *kind.layout.dims[1:])))


def _items(op: Builder, node: fx.Node, *names: str) -> tuple[fx.Node, ...]:
    return tuple(op(operator.getitem, node, position, name=name) for position, name in enumerate(names))
