"""As many rows as an expert has seats, to the ranks of the experts and back: the others are dropped.

Each rank has the same number of seats for every expert, whatever the load is. All sizes are known before the run: what
is exchanged is the buffer, in equal parts, and the products of a rank are batched ones. The rows of a rank are a group
of their own (Lepikhin et al. 2020, GShard, section 2.2, "local group dispatching"; Fedus et al. 2021, Switch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import Value, value
from autopar.ir.rewrite import operand
from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.routing import own_experts
from autopar.routing.exchange import Exchange, Rows, items, with_first

aten = torch.ops.aten

UNCHANGED = (aten.reshape.default, aten._to_copy.default)  # of ids, on the way from topk


@dataclass
class Buffers(Exchange):
    """The rewriting of one region, with an exchange of buffers.

    ``factor``: the seats of an expert, by the rows that it would have if the load were balanced.

    A buffer has its experts outermost, then the seats: local ``[ways * own, capacity]`` before it is sent, and
    ``[own, ways * capacity]`` where it has arrived, with the seats of all ranks.
    """

    factor: float = 1.0

    def write(self) -> None:
        super().write()
        for node in reversed((*self.sent.values(), *self.region.inside)):
            if not node.users:  # rows of which only the stack is used
                node.graph.erase_node(node)

    @property
    def capacity(self) -> int:
        """The seats of an expert for the rows of one rank."""
        return min(math.ceil(Fraction(str(self.factor)) * self.count / self.region.experts), self.count)

    @property
    def _own(self) -> int:
        return own_experts(self.region.experts, self.ways)

    def write_route(self, op: Builder, ids: fx.Node) -> None:
        numbers = Value(torch.int64, Layout((self.own_rows,)))
        fibres = tuple(Factor(self.mesh.size(axis), (axis,)) for axis in (*self.others, *self.group))
        table = Layout((fibres or (Factor(1),), (Factor(self.ways),), (Factor(self._own + 1),)))
        like = (numbers, with_first(numbers, self._filled), replace(numbers, layout=table))
        arguments = (self.region.experts, self.ways, self.capacity, self._choices, *self.placed)
        found = op(SEAT_ROWS, ids, *arguments, like=like, name="seat_rows")
        seats, self.seated, counts = items(op, found, "seats", "seated", "counts")
        self.seats = self.noted(op, seats, counts)

    @property
    def _choices(self) -> int:
        """The experts that a token chooses: rows for each of its rows, or as many as ``topk`` says."""
        rows = value(self.region.ids).layout.local_shape(self.mesh)[0]
        found = rows // min(value(source).layout.local_shape(self.mesh)[0] for source in self.region.taken)
        node = self.region.ids
        while node.target in UNCHANGED:
            node = operand(node)
        best = node.all_input_nodes[0] if node.all_input_nodes else node
        if best.target is aten.topk.default:
            found = max(found, value(node).shape[-1])
        return found

    # ------------------------------------------------------------ rows

    @property
    def _filled(self) -> Rows:
        """The seats of all ranks before they are sent."""
        own = (*self.others, *self.group)
        return (Factor(self.ways * self._own), *self.of_ranks(self.capacity, own))

    @property
    def arrived(self) -> Rows:
        return (
            Factor(self.ways * self._own, self.group),
            *self.of_ranks(self.ways * self.capacity, self.others),
        )

    def send(self, op: Builder, rows: fx.Node) -> fx.Node:
        kind = value(rows)
        filled = op(PICK_ROWS, rows, self.seated, self.seats, like=with_first(kind, self._filled))
        return self._exchanged(op, filled, with_first(kind, self.arrived), 1, 0)

    def fetch(self, op: Builder, rows: fx.Node, kind: Value) -> fx.Node:
        home = self._exchanged(op, rows, with_first(kind, self._filled), 0, 1)
        return op(PICK_ROWS, home, self.seats, self.seated, like=kind)

    def _exchanged(self, op: Builder, rows: fx.Node, kind: Value, source: int, target: int) -> fx.Node:
        if not self.group:
            return rows
        ends = (self.axis, self.ways, [source, 1, 1], [target, 1, 1])
        found = op(comm.OPS.all_to_all.default, self._stacked(op, rows), *ends, like=_stack_of(kind))
        return self._shaped(op, found, kind)

    def _shaped(self, op: Builder, node: fx.Node, kind: Value) -> fx.Node:
        return op(aten.reshape.default, node, list(kind.layout.local_shape(self.mesh)), like=kind)

    def _stacked(self, op: Builder, rows: fx.Node) -> fx.Node:
        kind = _stack_of(value(rows))
        made_of_it = rows.target is aten.reshape.default and value(operand(rows)) == kind
        return operand(rows) if made_of_it else self._shaped(op, rows, kind)

    # ------------------------------------------------------------ experts

    def write_product(self, node: fx.Node) -> None:
        op = Builder(before=node)
        product = op(aten.bmm.default, self._stacked(op, operand(node)), operand(node, 1), like=_stack_of(value(node)))
        self._unstack(node, product)

    def write_vector(self, node: fx.Node) -> None:
        """Once for each seat of the expert."""
        op, kind = Builder(before=node), _stack_of(value(node))
        table = operand(node)
        first, *rest = value(table).layout.dims
        dims = (first, (Factor(1),), *rest)
        one = replace(value(table), layout=replace(value(table).layout, dims=dims))
        sizes = list(kind.layout.local_shape(self.mesh))
        self._unstack(node, op(aten.expand.default, op(aten.unsqueeze.default, table, 1, like=one), sizes, like=kind))

    def _unstack(self, node: fx.Node, stack: fx.Node) -> None:
        """Let ``node`` be the rows of a stack."""
        node.target, node.kwargs = aten.reshape.default, {}
        node.args = (stack, list(value(node).layout.local_shape(self.mesh)))


def _stack_of(kind: Value) -> Value:
    """The type of rows whose experts are a dim of their own."""
    (experts, seats), *rest = kind.layout.dims
    return replace(kind, layout=replace(kind.layout, dims=((experts,), (seats,), *rest)))
