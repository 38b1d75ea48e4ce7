"""The routed regions of a graph: products of rows with the matrices of the experts that the rows were sent to.

A region is all products with the same ids and what lies between them, row by row. Vectors that are picked for each row
(``bias[ids]``) and what combines them with the rows belong to it too. So its rows may be in any order, and on any rank,
as long as each is with its expert.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import value, values
from autopar.ir.operator_facts import argument_names, is_pointwise
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.operators.experts import EXPERT_LINEAR
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Factoring, Part
from autopar.split.flow import weights_of

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten.expand.default)  # sizes of the result are an argument
KNOWN = {  # those that take any number of rows, with derivatives that do (autodiff/ragged.py)
    *RESHAPES, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.cat.default,
    aten.clone.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
    aten.sum.dim_IntList, aten.mean.dim, aten.softmax.int, aten.linear.default, aten._to_copy.default,
    aten.repeat_interleave.self_int,
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """``inside``: its nodes in order, products and vectors too. ``taken``: values from outside that have its rows, or
    one row for each of the experts of a token. ``given``: nodes inside that are used outside."""

    ids: fx.Node
    experts: int
    products: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        """What holds one matrix, or one vector, for each expert."""
        return (*(operand(node, 1) for node in self.products), *(operand(node) for node in self.vectors))


class NotRowwise(Exception):
    """Why the rows of a region may not be moved."""


def regions_of(program: Program) -> tuple[list[Region], dict[fx.Node, str]]:
    """The regions of a program, and for products that are in none, why."""
    weights = weights_of(program)
    by_ids: dict[fx.Node, list[fx.Node]] = {}
    vectors: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is EXPERT_LINEAR:
            by_ids.setdefault(operand(node, 2), []).append(node)
        elif (ids := _picked(node, weights)) is not None:
            vectors.setdefault(ids, []).append(node)
    nodes = list(program.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    found, reasons = list[Region](), dict[fx.Node, str]()
    for ids, products in by_ids.items():
        experts = {value(operand(node, 1)).layout.local_shape(program.mesh)[0] for node in products}
        picked = [node for node in vectors.get(ids, ()) if {value(operand(node)).shape[0]} == experts]
        try:
            if len(experts) > 1:
                raise NotRowwise(f"its products have {' and '.join(map(str, sorted(experts)))} experts")
            finder = _Finder(program, nodes, places, weights, ids, frozenset(picked))
            found.append(finder.region(products, picked, experts.pop()))
        except NotRowwise as problem:
            reasons |= dict.fromkeys(products, str(problem))
    return found, reasons


def _picked(node: fx.Node, weights: Set[fx.Node]) -> fx.Node | None:
    """The ids of ``table[ids]``, one row of a table of weights for each id."""
    if node.target is not aten.index.Tensor or operand(node) not in weights:
        return None
    slots = node.args[1]
    assert isinstance(slots, (list, tuple))
    first, *rest = slots
    if not isinstance(first, fx.Node) or any(slot is not None for slot in rest):
        return None
    return first if len(value(first).shape) == 1 and value(first).dtype != torch.bool else None


@dataclass
class _Finder:
    program: Program
    nodes: Sequence[fx.Node]
    places: dict[fx.Node, int]
    weights: Set[fx.Node]
    ids: fx.Node
    vectors: Set[fx.Node]
    taken: dict[fx.Node, None] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self._sizes(self.ids)[0]

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        return values(node)[0].layout.local_shape(self.program.mesh)

    def region(self, products: Sequence[fx.Node], vectors: Sequence[fx.Node], experts: int) -> Region:
        seeds = [*products, *vectors]
        inside = self._between(seeds)
        while more := [node for node in self._next(inside) if self._joins(node, inside)]:
            seeds += more
            inside = self._between(seeds)
        ordered = tuple(sorted(inside, key=self.places.__getitem__))
        for node in ordered:
            self._check(node, inside)
        given = tuple(node for node in ordered if any(user not in inside for user in node.users))
        for node in given:
            if len(values(node)) > 1 or node in self.vectors:
                raise NotRowwise(f"{node.name} is used outside of the products that it belongs to")
        return Region(self.ids, experts, tuple(products), tuple(vectors), ordered, tuple(self.taken), given)

    def _between(self, seeds: Iterable[fx.Node]) -> set[fx.Node]:
        """``seeds`` and all that lies on a path from one to another."""
        ends = set(seeds)
        places = [self.places[node] for node in ends]
        window = self.nodes[min(places) : max(places) + 1]
        reached, needed = set(ends), set(ends)
        for node in window:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        for node in reversed(window):
            if node in needed:
                needed.update(node.all_input_nodes)
        return reached & needed

    def _next(self, inside: Set[fx.Node]) -> list[fx.Node]:
        users = dict.fromkeys(user for node in inside for user in node.users)
        return [user for user in users if user not in inside and user.op == "call_function"]

    def _joins(self, node: fx.Node, inside: Set[fx.Node]) -> bool:
        """Whether a user of the region belongs to it: it combines two of its values, or takes a vector."""
        own = [source for source in node.all_input_nodes if source in inside]
        alone = not self.vectors.isdisjoint(self._roots(own, inside))
        if alone:
            return True  # else the vectors of all experts would have to be on every rank
        try:
            return len(own) > 1 and self._row_operands(node, inside) is not None
        except NotRowwise:
            return False

    def _roots(self, nodes: Iterable[fx.Node], inside: Set[fx.Node]) -> set[fx.Node]:
        """``nodes``, and those that they are made of by operators of one operand."""
        found = set[fx.Node]()
        for node in nodes:
            while node in inside:
                found.add(node)
                if node in self.vectors or len(node.all_input_nodes) != 1:
                    break
                (node,) = node.all_input_nodes
        return found

    # ------------------------------------------------------------ row by row

    def _check(self, node: fx.Node, inside: Set[fx.Node]) -> None:
        for source in self._row_operands(node, inside):
            if source not in inside and source is not self.ids:
                self.taken[source] = None

    def _row_operands(self, node: fx.Node, inside: Set[fx.Node]) -> list[fx.Node]:
        """The operands of ``node`` that have one row for each id, or for each token. Raises NotRowwise."""
        if node.target is EXPERT_LINEAR:
            return [operand(node)]
        if node in self.vectors or node.target is operator.getitem:
            return []
        call, rule = call_of(node, self.program.mesh, frozenset()), rule_for(node.target)
        known = node.target in KNOWN or node.target in comm.TARGETS or is_pointwise(node.target)
        if rule is None or not known:
            raise NotRowwise(f"{node.name} = {node.target} is not known to take a number of rows that changes")
        factoring = rule(call)
        dims = [found for x, found in zip(call.operands, factoring.inputs) if x in inside]
        rows = dims[0][0] if dims and dims[0] else ()
        if len(rows) != 1 or rows[0] in factoring.whole or factoring.sizes[rows[0]] != self.rows:
            raise NotRowwise(f"{node.name} = {node.target} does not treat each row alone")
        self._check_rows(node, factoring, rows[0])
        return [x for x, found in zip(call.operands, factoring.inputs) if rows[0] in {f for dim in found for f in dim}]

    def _check_rows(self, node: fx.Node, factoring: Factoring, rows: str) -> None:
        for tensor in (*factoring.inputs, *factoring.outputs):
            elsewhere = any(rows in dim for dim in tensor[1:])
            if elsewhere or (tensor and rows in tensor[0] and tensor[0] != (rows,)):
                raise NotRowwise(f"{node.name} = {node.target} has its rows in another dim")
        if not all(tensor and tensor[0] == (rows,) for tensor in factoring.outputs):
            raise NotRowwise(f"{node.name} = {node.target} adds up its rows")
        if factoring.localize is not None and node.target not in RESHAPES and self._says_rows(node, factoring, rows):
            raise NotRowwise(f"{node.name} = {node.target} has the number of rows among its arguments")

    def _says_rows(self, node: fx.Node, factoring: Factoring, rows: str) -> bool:
        """Whether the arguments of ``node`` are others where there are fewer rows."""
        ways = next((n for n in range(2, self.rows + 1) if self.rows % n == 0), 0)
        names = argument_names(node.target)
        dim = {**dict(zip(names, node.args)), **node.kwargs}.get("dim")
        if isinstance(dim, int) and dim % len(values(node)[0].shape):
            return False  # what it says is about that dim
        strategy = factoring.strategy(Part(rows), ways) if ways else None
        if strategy is None or factoring.localize is None:
            return True
        call = call_of(node, self.program.mesh, frozenset())
        shapes = tuple((self.rows // ways, *shape[1:]) for shape in call.outputs)
        args, kwargs = factoring.localize(call, strategy, shapes, ways)
        return (tuple(args), dict(kwargs)) != (node.args, dict(node.kwargs))
