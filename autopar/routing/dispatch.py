"""As many rows as there are, to the ranks of their experts and back: nothing is dropped.

A rank knows at run time only how many rows arrive; what is written has the number of a balanced load, marked as ragged.
(Gale et al. 2023, MegaBlocks; the exchange: Rajbhandari et al. 2022, DeepSpeed-MoE, section 5.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import Value, value
from autopar.operators.routing import COLUMNS, PERMUTE_ROWS, RECEIVED_IDS, ROUTE_ROWS, ROW_SIZES, own_experts
from autopar.routing.exchange import Exchange, Rows, items, with_first

aten = torch.ops.aten


@dataclass
class Dispatch(Exchange):
    """The rewriting of one region, with an exchange of rows in parts of unequal sizes."""

    sizes: tuple[fx.Node, ...] = ()  # rows that are sent to each rank, and that come from it

    def write_route(self, op: Builder, ids: fx.Node) -> None:
        """The order of the rows, how many go to each rank and come from it, and the ids of those that arrive."""
        ways, experts = self.ways, self.region.experts
        own = own_experts(experts, ways)
        numbers = Value(torch.int64, Layout((self.own_rows,)))
        fibres = tuple(Factor(self.mesh.size(axis), (axis,)) for axis in self.others)
        here, whole, bins = Factor(ways, (self.axis,)), Factor(ways), (Factor(own + 1),)
        table = Value(torch.int64, Layout(((*fibres, here), (whole,), bins)))
        swapped = Value(torch.int64, Layout(((*fibres, whole), (here,), bins)))
        sizes = Value(torch.int64, Layout(((*fibres, here, whole),)))
        route = op(ROUTE_ROWS, ids, experts, ways, *self.placed, like=(numbers, numbers, table), name="route")
        order, self.inverse, counts = items(op, route, "order", "inverse", "counts")
        self.order = self.noted(op, order, counts)
        swap = (self.axis, ways, [0, 1, 1], [1, 1, 1])
        received = op(comm.OPS.all_to_all.default, counts, *swap, like=swapped, name="received")
        both = op(ROW_SIZES, counts, received, like=(sizes, sizes), name="sizes")
        self.sizes = items(op, both, "send", "receive")
        rows = numbers.layout.local_shape(self.mesh)[0]
        self.ids = op(RECEIVED_IDS, received, rows, like=with_first(numbers, self.arrived))

    @property
    def arrived(self) -> Rows:
        return self.of_ranks(self.count, (*self.others, self.axis), ragged=True)

    def send(self, op: Builder, rows: fx.Node) -> fx.Node:
        kind = with_first(value(rows), self.own_rows)
        picked = op(PERMUTE_ROWS, rows, self.order, self.inverse, like=kind)
        arrived = with_first(kind, self.arrived)
        return op(comm.OPS.dispatch_rows.default, picked, self.axis, self.ways, *self.sizes, like=arrived)

    def fetch(self, op: Builder, rows: fx.Node, kind: Value) -> fx.Node:
        own, sizes = with_first(kind, self.own_rows), reversed(self.sizes)
        home = op(comm.OPS.return_rows.default, rows, self.axis, self.ways, *sizes, like=own)
        return op(PERMUTE_ROWS, home, self.inverse, self.order, like=kind)

    def write_product(self, node: fx.Node) -> None:
        node.args = (*node.args[:2], self.ids)

    def write_vector(self, node: fx.Node) -> None:
        args: Any = node.args
        node.args = (args[0], [self.ids, *args[1][1:]])

    def write_inside(self, node: fx.Node) -> None:
        super().write_inside(node)
        if node.target is aten.slice.Tensor:
            source, dim, start, end, *step = node.args  # in canonical form
            node.target, node.args = COLUMNS, (source, dim, start, end, *(step or [1]))
