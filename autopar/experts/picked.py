"""Values over (token, expert), computed for the chosen pairs alone.

``Picker.pick(node)`` gives the rows of ``node`` at the pairs of each token with the experts that it chose. It goes from
what is wanted back to the marks, to values of tokens alone and to weights of experts alone; each operator between is
repeated on rows. A product with one matrix for each expert becomes ``expert_linear``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autopar.experts.choices import Mark, Number, constant
from autopar.experts.digits import CHOICE, EXPERT, OTHER, TOKEN, Located, Places, Unaligned, has, size_of
from autopar.experts.products import Operand, multiplied
from autopar.experts.rows import Arranger, Lead, Rows, further, is_further
from autopar.experts.tracked import SOFTMAX, Tracked, is_elementwise, over_experts
from autopar.ir.node import origin, value
from autopar.ir.operator_facts import argument_names, is_random
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import operand

aten = torch.ops.aten

_VIEWS = {
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int,
}  # fmt: skip
_SUMS = {aten.sum.dim_IntList, aten.any.dim}
_ALONG = {
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.select.int, aten.softmax.int,
    aten.cat.default, aten.glu.default, aten.mean.dim, aten.cumsum.default, aten.flip.default,
}  # fmt: skip
_OF_LAST_DIMS = {aten.layer_norm.default, aten.rms_norm.default}


class Picker:
    """Computes rows in front of one node. ``products``: each expert_linear that was made for it, with its weights."""

    def __init__(self, found: Tracked, experts: int, before: fx.Node) -> None:
        self.found = found
        self.rows = Arranger(found.constants, found.chosen, experts, before)
        self.op = self.rows.op
        self.products: list[tuple[fx.Node, fx.Node]] = []
        self._known: dict[tuple[fx.Node, Places], Rows] = {}
        self._several: dict[fx.Node, fx.Node] = {}  # operators with several results

    def pick(self, node: fx.Node, places: Places) -> Rows:
        """The rows of ``node``, whose dims are at ``places``. Raises Unaligned where they cannot be computed alone."""
        key = (node, places)
        if key not in self._known:
            outside, self.op.origin = self.op.origin, origin(node)
            try:
                self._known[key] = self._picked(node, places)
            except Unaligned as error:
                raise error.at(node) from error
            self.op.origin = outside
        return self._known[key]

    def _picked(self, node: fx.Node, places: Places) -> Rows:
        if node in self.found.marks:
            return self._mark(node, self.found.marks[node])
        filled = constant(node, self.found.constants)
        if filled is not None and has(places, EXPERT) and has(places, TOKEN):
            return self._filled(node, filled, places)
        if not has(places, EXPERT):
            lead = Lead.PAIR if has(places, CHOICE) else Lead.TOKEN if has(places, TOKEN) else Lead.NOTHING
            return self.rows.rows_of(node, places, lead)
        if not has(places, TOKEN) and not has(places, CHOICE):
            return self.rows.rows_of(node, places, Lead.EXPERT)
        if node not in self.found.places and math.prod(further(places)) == 1 and not has(places, CHOICE):
            return self._number(node, places)
        return self._computed(node, places)

    def _computed(self, node: fx.Node, places: Places) -> Rows:
        if node.target is operator.getitem:
            parent, number = operand(node), node.args[1]
            assert isinstance(number, int)
            return self._shaped(self.op(operator.getitem, self._parts(parent, places, number), number), places)
        if node.op != "call_function":
            raise Unaligned("it holds something else for each token and expert")
        return self._call(node, self.found.located(node, result=places), places)

    def _call(self, node: fx.Node, located: Located, places: Places) -> Rows:
        if node.target in _VIEWS:
            return self._view(located, places)
        if is_random(node.target) and len(node.users) > 1:
            raise Unaligned("it draws random numbers that are used elsewhere too")
        if node.target is SOFTMAX and has((located.operand(0)[node.args[1]],), EXPERT):  # type: ignore[index]
            return self._hidden_softmax(node, located, places)
        if is_elementwise(node.target):
            return self._pointwise(node, located, places)
        if node.target in _SUMS or located.factoring.contraction:
            if any(digit.of in (TOKEN, EXPERT) for digit in located.gone):
                raise Unaligned("it sums over tokens or experts")
            if any(digit.of == CHOICE for digit in located.gone) and self.found.offs.get(node) != 0:
                raise Unaligned("it sums over choices, and what it sums for other experts is not 0")
            return self.reduced(node, located, places)
        if node.target in _ALONG or node.target in _OF_LAST_DIMS:
            return self._shaped(self._along(node, located), places)
        raise Unaligned("it is not computed for each pair of a token and an expert alone")

    def reduced(self, node: fx.Node, located: Located, places: Places) -> Rows:
        """A product or a sum of rows, as ``node`` is one, but not summed over experts or choices.

        The sum over the choices of a token has one term at each pair, if the terms at other pairs are 0.
        """
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
            raise Unaligned("it scales what it adds")
        factoring = located.factoring
        operands = [self._factors(located, i) for i in range(len(factoring.inputs)) if i not in factoring.added]
        wanted = located.further(factoring.outputs[0])
        found, made = multiplied(self.rows, operands, wanted, located.others)
        self.products += made
        total = self._shaped(found.node, places, found.lead)
        for number in factoring.added:
            summand = self._lined(located, number, places)
            total = Rows(self.op(aten.add.Tensor, total.node, summand), total.lead, total.further)
        return Rows(self.op.cast(total.node, value(node).dtype), total.lead, total.further)

    def _factors(self, located: Located, number: int) -> Operand:
        rows = self.pick(located.call.operands[number], located.operand(number))
        names = located.further(located.factoring.inputs[number])
        sizes = tuple(located.others[name] for name in names)
        node = self.rows.shaped(rows.node, *self.rows.length(rows.lead), *sizes)
        return Operand(Rows(node, rows.lead, sizes), names)

    def _shaped(self, node: fx.Node, places: Places, lead: Lead = Lead.PAIR) -> Rows:
        """``node`` as rows of a value at ``places``."""
        shape = further(places)
        return Rows(self.rows.shaped(node, *self.rows.length(lead), *shape), lead, shape)

    # ---------------------------------------------------------------- where the walk ends

    def _mark(self, node: fx.Node, mark: Mark) -> Rows:
        """What a mark holds where the expert is chosen."""
        if isinstance(mark.chosen, fx.Node):
            return self._shaped(self.rows.rows_of(mark.chosen, mark.ids_places, Lead.PAIR).node, mark.places)
        return self._filled(node, mark.chosen, mark.places)

    def _filled(self, node: fx.Node, number: Number, places: Places) -> Rows:
        shape, here = [*self.rows.length(Lead.PAIR), *further(places)], torch.device("cpu")  # emitted as the rank's
        return self._shaped(self.op(aten.full.default, shape, number, dtype=value(node).dtype, device=here), places)

    def _number(self, node: fx.Node, places: Places) -> Rows:
        """A number for each token and expert: computed alone where experts compute it, else those of the chosen ones.

        A router computes its probabilities for all experts; the norm of what an expert gives needs this expert alone.
        """
        try:
            rows = self._computed(node, places)
        except Unaligned:
            rows = None
        if rows is not None and not ancestors([rows.node]).isdisjoint(product for product, _ in self.products):
            return rows
        chosen = self.rows.shaped(self.rows.ids, *self.rows.length(Lead.TOKEN), self.rows.choices)
        return self._shaped(self.op(aten.gather.default, self.rows.table(node, places), 1, chosen), places)

    # ---------------------------------------------------------------- operators on rows

    def _view(self, located: Located, places: Places) -> Rows:
        found = self._factors(located, 0)
        wanted = located.further(located.factoring.outputs[0])
        rows = self.rows.reordered(found.rows, found.names, located.others, wanted)
        return self._shaped(rows.node, places, rows.lead)

    def _pointwise(self, node: fx.Node, located: Located, places: Places) -> Rows:
        lined = {x: self._lined(located, number, places) for number, x in enumerate(located.call.operands)}
        if node.target is aten.mul.Tensor and all(isinstance(factor, fx.Node) for factor in node.args):
            return self._shaped(self.rows.product(*(lined[operand(node, i)] for i in range(2))), places)
        return self._shaped(self._again(node, lined), places)

    def _lined(self, located: Located, number: int, places: Places) -> fx.Node:
        """Pairs of an operand, with as many further dims as the result at ``places`` that it is broadcast to."""
        own = located.operand(number)
        rows = self.pick(located.call.operands[number], own)
        padded = ((),) * (len(places) - len(own)) + own
        wanted = tuple(size_of(mine, OTHER) for mine, place in zip(padded, places) if is_further(place))
        node = self.rows.shaped(rows.node, *self.rows.length(rows.lead), *wanted)
        return self.rows.pairs(Rows(node, rows.lead, wanted)).node

    def _hidden_softmax(self, node: fx.Node, located: Located, places: Places) -> Rows:
        """Over all experts, where those that are not chosen are -inf: over the choices of each token."""
        if self.found.offs.get(operand(node)) != -math.inf or not over_experts(self.found, node):
            raise Unaligned("a softmax over experts, of which those not chosen are not -inf")
        rows = self.pick(operand(node), located.operand(0))
        table = self.op.reshape(rows.node, *self.rows.length(Lead.TOKEN), self.rows.choices)
        return self._shaped(self._again(node, {operand(node): table}, dim=1), places)

    def _parts(self, node: fx.Node, places: Places, number: int) -> fx.Node:
        """An operator with several results, of which ``number`` is at ``places``."""
        if node not in self._several:
            self._several[node] = self._along(node, self.found.located(node, result=places, number=number))
        return self._several[node]

    def _along(self, node: fx.Node, located: Located) -> fx.Node:
        """An operator that works along further dims, which are elsewhere in the rows."""
        places = located.operand(0)
        names = argument_names(node.target)
        given = dict(zip(names, node.args), **node.kwargs)
        changed: dict[str, Any] = {}
        for name in ("dim", "dims"):
            if name in names:
                default = node.target._schema.arguments[names.index(name)].default_value  # type: ignore[union-attr]
                changed[name] = self._moved(given.get(name, default), places)
        if node.target in _OF_LAST_DIMS:
            normalised = given["normalized_shape"]
            assert isinstance(normalised, (list, tuple))
            for dim in range(1, 1 + len(normalised)):
                self._moved(-dim, places)
        rows = {
            x: self.rows.pairs(self.pick(x, located.operand(number))).node
            for number, x in enumerate(located.call.operands)
        }
        return self._again(node, rows, **changed)

    def _moved(self, dims: Any, places: Places) -> Any:
        if isinstance(dims, (list, tuple)):
            return [self._moved(dim, places) for dim in dims]
        dim = dims % len(places)
        if any(digit.of != OTHER for digit in places[dim]):
            raise Unaligned(f"it works along the {places[dim][0].of}s")
        return 1 + sum(map(is_further, places[:dim]))

    def _again(self, node: fx.Node, rows: Mapping[fx.Node, fx.Node], **changed: Any) -> fx.Node:
        """The operator on ``rows`` in place of its operands, with some arguments ``changed``."""
        names = argument_names(node.target)
        given = [changed.get(name, argument) for name, argument in zip(names, node.args)]
        missing = {name: changed[name] for name in changed if name not in names[: len(given)]}
        arguments: Any = fx.map_arg((given, {**node.kwargs, **missing}), rows.__getitem__)
        return self.op(node.target, *arguments[0], **arguments[1])
