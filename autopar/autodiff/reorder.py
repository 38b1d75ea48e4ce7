"""The order in which a rank runs one graph: collectives start early and are waited for late.

The nodes are placed one by one in the order of the graph. Gathers of parameters are placed before a node as far as the
limit allows. Reductions start at their turn, and are waited for when their result is used. Gradients of weights are
delayed until a sum that backward needs next has started, where that is in their block or in the next one: until then
they hold activations.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import fx

from autopar.autodiff.hoist import only_returned
from autopar.ir.blocks import block_of
from autopar.ir.collectives import GATHERS, OPS, PART, REDUCTIONS, STARTS, TARGETS, row_of, split_of
from autopar.ir.fast_graph import created
from autopar.ir.layout import Split
from autopar.ir.node import origin, output_node, set_origin, set_values, value, values
from autopar.ir.operator_facts import is_product, is_view
from autopar.ir.reach import ancestors
from autopar.mesh import Mesh

aten = torch.ops.aten


class Reordering:
    """A new order for the nodes of one graph, in which collectives are split into start and wait.

    ``limit``: bytes of gathers that may be under way, and as many of reductions.
    """

    def __init__(self, mesh: Mesh, graph: fx.Graph, limit: float, is_backward: bool) -> None:
        self.mesh, self.graph, self.limit = mesh, graph, limit
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.end = output_node(graph)
        self.under_way: dict[fx.Node, float] = {}  # collective -> bytes that it holds
        self.waits: dict[fx.Node, fx.Node] = {}  # collective that has been started -> its wait
        self.late = self._late()  # a node that only arranges a reduction's result to return it -> the reduction
        self.delayed: dict[fx.Node, list[fx.Node]] = {}  # reduction under way -> the nodes that arrange its result
        self.ahead = deque(node for node in self.nodes if node.target in GATHERS and self._can_start(node))
        self.gathers = set(self.ahead)
        self.done: set[fx.Node] = set()  # brought forward
        self.hidden = self._hidden() if is_backward else set()
        self.aside = self._aside()
        self.put_off: list[fx.Node] = []
        self.places = {node: place for place, node in enumerate(self.nodes)}

    def run(self) -> None:
        """Put the graph, in place, into the new order."""
        for node in self.nodes:
            if node in self.aside:
                self.put_off.append(node)
                continue
            self._place(node)
            if node in self.hidden:
                self._catch_up()
        self._catch_up()
        for node in list(self.under_way):
            self._arrive(node)

    def _place(self, node: fx.Node) -> None:
        """Place the next node of the new order."""
        if self.late.get(node) in self.under_way:
            self.delayed[self.late[node]].append(node)
            return
        for source in node.all_input_nodes:
            self._arrive(source)
        self._prefetch(node)
        if node in self.waits or node in self.done:
            return  # a gather under way, waited for before its first use, or its operands
        if _is_reduction(node) and self._can_start(node) and (node in self.hidden or self._pays(node)):
            self._make_room(node)
            self._start(node)
        else:
            self.end.prepend(node)

    def _catch_up(self) -> None:
        for node in self.put_off:
            self._place(node)
        self.put_off.clear()

    # ------------------------------------------------------------ what may be moved

    def _can_start(self, node: fx.Node) -> bool:
        """Whether the collective stacks or cuts dim 0 in equal parts, without work before or after."""
        if self.mesh.size(str(node.args[1])) == 1:
            return False
        if row_of(TARGETS[node.target]).form is not PART:
            return True
        length, ways = node.args[6], node.args[2]
        assert isinstance(length, int) and isinstance(ways, int)
        return split_of(node.args[1:]) == Split(0) and length % ways == 0

    def _pays(self, node: fx.Node) -> bool:
        """Whether something else is computed before the first use of a reduction."""
        if all(user in self.late or user is self.end for user in node.users):
            return True
        for place in range(self.places[node] + 1, len(self.nodes)):
            other = self.nodes[place]
            if other not in self.late and not is_view(other.target):
                return node not in other.all_input_nodes
        return False

    def _late(self) -> dict[fx.Node, fx.Node]:
        late: set[fx.Node] = set()
        for node in reversed(self.nodes):
            ends = node.users and all(user in late or user is self.end for user in node.users)
            if ends and is_view(node.target) and len(node.all_input_nodes) == 1:
                late.add(node)
        before = {node: self._reduction_before(node) for node in self.nodes if node in late}
        return {node: reduction for node, reduction in before.items() if reduction is not None}

    def _hidden(self) -> set[fx.Node]:
        """Sums whose result backward uses; nodes that do not depend on them can hide them.

        The messages of a ring are none: a tile is computed beside each, and what is put off holds its activations.
        """
        returned = only_returned(self.graph)
        found = {node for node in self.nodes if node.target in REDUCTIONS and self._can_start(node)}
        return {node for node in found if any(user not in returned for user in node.users)}

    def _aside(self) -> set[fx.Node]:
        """The nodes that no hidden sum depends on, and that have at most a block to wait for the next one."""
        needed, found = ancestors(self.hidden), set[fx.Node]()
        between: set[str] | None = None  # blocks with products from a node to the hidden sum after it
        for node in reversed(self.nodes):
            between = set() if node in self.hidden else between
            if between is not None:
                between |= {block_of(node)} if is_product(node.target) else set()
                if node not in needed and len(between) <= 2:
                    found.add(node)
        return found

    def _reduction_before(self, node: fx.Node) -> fx.Node | None:
        while is_view(node.target) and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        return node if _is_reduction(node) and self._can_start(node) else None

    # ------------------------------------------------------------ moving it

    def _prefetch(self, node: fx.Node) -> None:
        """Start the gather ``node``, then those after it for which there is room, in their order."""
        if node in self.gathers and node not in self.waits:
            self._start(node)
        while self.ahead:
            gather = self.ahead[0]
            if gather in self.waits:
                self.ahead.popleft()
                continue
            held = self._held(gathers=True)
            if held and held + self._bytes(gather) > self.limit:
                return
            if not all(map(self._at_hand, gather.all_input_nodes)):
                return
            self._bring(gather.all_input_nodes)
            self._start(gather)

    def _at_hand(self, node: fx.Node) -> bool:
        """Whether ``node`` is an input, or only arranges or casts inputs."""
        arranges = is_view(node.target) or node.target in (aten.cat.default, aten._to_copy.default)
        return node.op == "placeholder" or (arranges and all(map(self._at_hand, node.all_input_nodes)))

    def _bring(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if node.op != "placeholder" and node not in self.done:
                self._bring(node.all_input_nodes)
                self.done.add(node)
                self.end.prepend(node)

    def _start(self, node: fx.Node) -> None:
        with self.graph.inserting_before(self.end):
            start = STARTS[node.target]  # type: ignore[index]
            started = created(self.graph, "call_function", start, node.args, node.kwargs, TARGETS[start])
            arrived = created(self.graph, "call_function", OPS.wait.default, (started, node.args[1]), {}, "wait")
        for new in (started, arrived):
            set_values(new, *values(node))
            set_origin(new, origin(node))
        self.under_way[node], self.waits[node] = self._bytes(node), arrived
        self.delayed.setdefault(node, [])

    def _make_room(self, node: fx.Node) -> None:
        """Wait for the oldest reductions until there is room for one more."""
        while (held := self._held(gathers=False)) and held + self._bytes(node) > self.limit:
            self._arrive(next(other for other in self.under_way if _is_reduction(other)))

    def _held(self, gathers: bool) -> float:
        """Bytes of the gathers, or of the reductions, that are under way."""
        return sum(size for node, size in self.under_way.items() if _is_reduction(node) != gathers)

    def _arrive(self, node: fx.Node) -> None:
        """Place the wait for a collective, and after it the nodes that were delayed until then."""
        if node not in self.under_way:
            return
        del self.under_way[node]
        arrived = self.waits[node]
        self.end.prepend(arrived)
        node.replace_all_uses_with(arrived)
        self.graph.erase_node(node)
        for later in self.delayed.pop(node, []):
            self.end.prepend(later)

    def _bytes(self, node: fx.Node) -> float:
        sizes = [math.prod(value(n).layout.local_shape(self.mesh)) for n in (node, *node.all_input_nodes)]
        return max(sizes) * value(node).dtype.itemsize


def _is_reduction(node: fx.Node) -> bool:
    return node.target in STARTS and node.target not in GATHERS
