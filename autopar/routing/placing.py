"""The weights of experts on the ranks of an axis: each rank has some of the experts, and their gradients whole.

From the products of a region back to the parameters: what is made of a parameter on the way (transposed, cast, seen in
another shape) is split along its experts as well, and no longer enters the axis, since each expert is on one rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.layout import REPLICATED, Layout, Split
from autopar.ir.node import set_values, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import axes_of
from autopar.routing.regions import Region
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Call, Factoring, Part, Strategy

ENTER = comm.OPS.enter.default


class CannotPlace(Exception):
    """Why experts cannot be dealt out."""


@dataclass
class _Step:
    """An operator on the way from a parameter to the products, and how it is split."""

    call: Call
    factoring: Factoring
    strategy: Strategy


@dataclass
class Placing:
    """The weights of some regions, and how they are split over ``axis``."""

    program: Program
    axis: str
    order: tuple[int, ...] = ()  # of the experts; empty: 0, 1, 2, ...
    splits: dict[fx.Node, Split] = field(default_factory=dict)  # of each value on the way
    steps: dict[fx.Node, _Step] = field(default_factory=dict)

    def add(self, regions: Iterable[Region], weights: Collection[fx.Node]) -> None:
        """Note how the weights of ``regions`` are split: not at all on an axis of one rank. Raises CannotPlace.

        ``weights``: parameters and what is made of them alone.
        """
        if self.program.mesh.size(self.axis) == 1:
            return
        users: set[fx.Node] = set()
        for region in regions:
            users.update(region.inside)
            for weight in region.weights:
                self._note(weight, Split(0), weights)
        for node in self.splits:
            for user in node.users:
                if user not in users and user not in self.splits:
                    raise CannotPlace(f"{_name(self.program, node)} is used by {user.name} too, outside of the experts")

    def _note(self, node: fx.Node, split: Split, weights: Iterable[fx.Node]) -> None:
        if self.splits.get(node) == split:
            return
        if node in self.splits:
            raise CannotPlace(f"{node.name} would be split in two ways, {self.splits[node]} and {split}")
        if node not in weights:
            raise CannotPlace(f"{node.name} is made of more than parameters")
        self.splits[node] = split
        if node.op == "placeholder" or node.target is ENTER:
            for source in node.all_input_nodes:
                self._note(source, split, weights)
            return
        step = self._step(node, split)
        self.steps[node] = step
        for source, placement in zip(step.call.operands, step.strategy.inputs):
            if isinstance(placement, Split):
                self._note(source, placement, weights)

    def _step(self, node: fx.Node, split: Split) -> _Step:
        rule, ways = rule_for(node.target), self.program.mesh.size(self.axis)
        call = call_of(node, self.program.mesh, frozenset())
        factoring = rule(call) if rule is not None else None
        if factoring is not None and len(factoring.outputs) == 1:
            part = factoring.part_of(factoring.outputs[0], split, ways)
            strategy = factoring.strategy(part, ways) if part is not None else _padded(factoring, split)
            if strategy is not None and any(isinstance(placement, Split) for placement in strategy.inputs):
                return _Step(call, factoring, strategy)
        sizes = list(call.outputs[0])
        raise CannotPlace(f"{node.name} = {node.target} {sizes} cannot be split into {ways} parts along its experts")

    def write(self) -> frozenset[str]:
        """Split the weights in the graph. Gives the axes of the group that they no longer enter."""
        mesh, ways = self.program.mesh, self.program.mesh.size(self.axis)
        for node, split in self.splits.items():
            kind = value(node)
            set_values(node, replace(kind, layout=self._ordered(kind.layout.place(self.axis, split, mesh), split.dim)))
        for node, step in self.steps.items():
            if step.factoring.localize is not None:
                shape = value(node).layout.local_shape(mesh)
                args, kwargs = step.factoring.localize(step.call, step.strategy, (shape,), ways)
                node.args, node.kwargs = args, kwargs
        own, entered = frozenset(axes_of(self.axis)), frozenset[str]()
        for node in self.splits:
            if node.target is ENTER and comm.axes_over(node) <= own:
                entered |= comm.axes_over(node)
                node.replace_all_uses_with(node.all_input_nodes[0])
                node.graph.erase_node(node)
        return entered

    def _ordered(self, layout: Layout, dim: int) -> Layout:
        """The layout whose experts lie in the order of the plan along ``dim``."""
        if not self.order:
            return layout
        (factor,) = layout.dims[dim] if len(layout.dims[dim]) == 1 else (None,)
        if factor is None or factor.size != len(self.order):
            raise CannotPlace(f"the experts lie along {layout}, whose order no layout can say")
        dims = (*layout.dims[:dim], (replace(factor, order=self.order),), *layout.dims[dim + 1 :])
        return replace(layout, dims=dims)


def _padded(factoring: Factoring, split: Split) -> Strategy | None:
    """Of the first factor of a dim in parts of unequal sizes, some with nothing, where each is whole in its dim."""
    names = factoring.outputs[0][split.dim]
    dims = [dim for tensor in (*factoring.inputs, *factoring.outputs) for dim in tensor if set(dim) & set(names)]
    if split != Split(split.dim) or len(names) != 1 or any(dim != names for dim in dims):
        return None
    part = Part(names[0])
    if part.factor not in factoring.uneven:
        return None
    cuts = [factoring.splits(part, tensor) for tensor in factoring.inputs]
    return Strategy(str(part), tuple(cut[0] if cut else REPLICATED for cut in cuts), (split,), part)


def _name(program: Program, node: fx.Node) -> str:
    names = {placed: entry.target for placed, entry in program.placeholders(InputKind.PARAMETER)}
    return f"parameter '{names[node]}'" if node in names else node.name
