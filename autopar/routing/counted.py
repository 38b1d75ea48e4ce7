"""The load of experts that every rank has whole: rows are counted, and stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import Value
from autopar.operators.routing import ROUTE_ROWS
from autopar.routing.dispatch import Dispatch
from autopar.routing.exchange import items


@dataclass
class Counting(Dispatch):
    """The rewriting of one region on an axis of one rank: its ids are behind what notes the load."""

    def write(self) -> None:
        """Count the rows of each expert, in the graph."""
        ids, experts = self.region.ids, self.region.experts
        op = Builder(before=self.region.inside[0])
        numbers = Value(torch.int64, Layout((self.own_rows,)))
        fibres = tuple(Factor(self.mesh.size(axis), (axis,)) for axis in self.others) or (Factor(1),)
        table = Value(torch.int64, Layout((fibres, (Factor(1),), (Factor(experts + 1),))))
        route = op(ROUTE_ROWS, ids, experts, 1, like=(numbers, numbers, table), name="route")
        _, _, counts = items(op, route, "order", "inverse", "counts")
        noted = self.noted(op, ids, counts)
        for node in self.region.inside:
            node.replace_input_with(ids, noted)
