"""What depends on which experts a token chose: the values over (token, expert), from the marks to where they end.

The walk follows the dims of the experts forward, operator by operator. It ends in the operators that sum over the
experts. ``off`` is the number that a value has for every pair that was not chosen, where that is known: found by
computing each operator on numbers, so that ``sigmoid(-inf)`` is 0, and so is any expert that maps 0 to 0.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.experts.choices import Chosen, Constants, Mark, Number, constant, is_ids, mark_of
from autopar.experts.digits import CHOICE, EXPERT, OTHER, TOKEN, Located, Places, Unaligned, has, size_of
from autopar.ir.node import value
from autopar.ir.operator_facts import is_overload, is_pointwise, is_view, linear_in
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.rules import call_of, rule_for
from autopar.rules.pointwise import broadcast

aten = torch.ops.aten

SUMS = {aten.sum.dim_IntList, aten.mean.dim}
_KEEP_ZEROS = {*SUMS, aten.any.dim, aten.dropout.default}
_MOVES = {
    aten.reshape.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.cat.default, operator.getitem,
}  # fmt: skip
_PARTS = {aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default}
ONE_BY_ONE = "it takes some of the experts by themselves, and what they do differs in more than their weights"
SOFTMAX = aten.softmax.int


@dataclass
class Tracked:
    """One choice, and the values over (token, expert) or (token, choice, expert) that are computed from its marks.

    Attributes:
        marks: the marks themselves.
        places: of every result of each tracked call.
        ends: calls that take tracked values and whose results have no expert any more.
        lost: calls that take tracked values and cannot be followed, and why.
        offs: what each tracked value is where the expert was not chosen; None where that is unknown.
    """

    program: Program
    constants: Constants
    chosen: Chosen
    marks: dict[fx.Node, Mark] = field(default_factory=dict)
    places: dict[fx.Node, tuple[Places, ...]] = field(default_factory=dict)
    ends: dict[fx.Node, Located] = field(default_factory=dict)
    lost: dict[fx.Node, str] = field(default_factory=dict)
    offs: dict[fx.Node, Number | None] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Places | None:
        """The places of the one result of a tracked call."""
        found = self.places.get(node)
        return found[0] if found and len(found) == 1 else None

    def located(
        self, node: fx.Node, known: Iterable[tuple[int, Places]] = (), result: Places | None = None, number: int = 0
    ) -> Located:
        """A call with the digits that its tracked operands, some ``known`` ones and one ``result`` give it.

        Raises Unaligned, for an operator without a rule too.
        """
        call = call_of(node, self.program.mesh)
        rule = broadcast if node.target is SOFTMAX else rule_for(node.target)
        if rule is None:
            raise Unaligned("it has no rule")
        factoring = rule(call)
        given = dict(known) | {i: places for i, x in enumerate(call.operands) if (places := self.of(x)) is not None}
        tensors = [(factoring.inputs[number], places) for number, places in given.items()]
        return Located.by(
            call, factoring, tensors if result is None else [(factoring.outputs[number], result), *tensors]
        )


def tracked(program: Program, constants: Constants, chosen: Chosen) -> Tracked:
    """Everything that is computed from the marks of one choice."""
    found = Tracked(program, constants, chosen)
    ids = {chosen.ids: chosen.places}
    queue: list[fx.Node] = []  # nodes compare by their place in the graph
    seen: set[fx.Node] = set()

    def follow(node: fx.Node) -> None:
        for user in node.users:
            if user.op == "call_function" and user not in seen:
                seen.add(user)
                heapq.heappush(queue, user)

    follow(chosen.ids)
    while queue:
        node = heapq.heappop(queue)
        if _follow_ids(found, node, ids) or _follow_values(found, node):
            follow(node)
    return found


def _follow_ids(found: Tracked, node: fx.Node, ids: dict[fx.Node, Places]) -> bool:
    """Whether ``node`` is the ids in another shape, or a mark of them."""
    if not any(source in ids for source in node.all_input_nodes):
        return False
    mark = mark_of(node, ids, found.constants)
    if mark is not None:
        found.marks[node], found.places[node], found.offs[node] = mark, (mark.places,), mark.off
        return True
    if not is_ids(node):
        return False
    try:
        places = found.located(node, [(0, ids[operand(node)])]).result()
    except Unaligned:
        return False
    if has(places, OTHER):
        return False
    ids[node] = places
    return True


def _follow_values(found: Tracked, node: fx.Node) -> bool:
    """Whether ``node`` has values over (token, expert) that are computed from tracked ones."""
    if node.target is operator.getitem:
        source, number = operand(node), node.args[1]
        if source in found.places and isinstance(number, int):
            found.places[node], found.offs[node] = (found.places[source][number],), found.offs.get(source)
        return source in found.places
    if not any(found.of(source) for source in node.all_input_nodes):
        return False
    try:
        located = found.located(node)
        places = tuple(map(located.result, range(len(located.call.outputs))))
    except Unaligned as error:
        found.lost[node] = ONE_BY_ONE if node.target in _PARTS else error.reason
        return False
    if any(size_of(itertools.chain(*each), TOKEN) != found.chosen.tokens for each in places):
        return False  # a sum over tokens: how often an expert was chosen
    if all(has(each, EXPERT) for each in places):
        found.places[node], found.offs[node] = places, off(found, node, located)
        return True
    if located.factoring.contraction or node.target in SUMS:
        found.ends[node] = located
    else:
        found.lost[node] = ONE_BY_ONE
    return False


def is_elementwise(target: Any) -> bool:
    """Whether each element of the result depends on the corresponding ones alone; of torch's tags some are missing."""
    return is_pointwise(target) or rule_for(target) is broadcast


# ---------------------------------------------------------------- pairs that were not chosen


def off(found: Tracked, node: fx.Node, located: Located) -> Number | None:
    """The number that all results of ``node`` are where the expert was not chosen; None where they may be anything.

    Infinities and NaN that an expert would give for a token that did not choose it do not count.
    """
    known = {source: found.offs[source] for source in _comparable(found, node)}
    known |= {x: constant(x, found.constants) for x in node.all_input_nodes if x not in found.places}
    numbers = [known.get(source) for source in located.call.operands]
    if node.target is SOFTMAX:
        return 0 if numbers == [-math.inf] and over_experts(found, node) else None
    if is_elementwise(node.target) and node.target is not aten.dropout.default:
        return _pointwise(node, known)
    if is_view(node.target) or node.target in _MOVES:
        return numbers[0] if None not in numbers and len(set(numbers)) == 1 else None
    zero = [number == 0 and number is not None for number in numbers]
    if node.target in _KEEP_ZEROS:
        return 0 if all(zero) else None
    if located.factoring.contraction:
        products = [group for group in located.factoring.linear if all(zero[position] for position in group)]
        return 0 if products else None
    return None


def _comparable(found: Tracked, node: fx.Node) -> Iterator[fx.Node]:
    """The tracked operands that are ``off`` where the result is.

    A value without the choice is 0 only where no choice of a token is the expert; one with it, where this one is not.
    """
    sources = [source for source in node.all_input_nodes if source in found.offs and found.places.get(source)]
    chooses = [any(has(places, CHOICE) for places in found.places[source]) for source in sources]
    yield from (source for source, one in zip(sources, chooses) if one or not any(chooses))


def over_experts(found: Tracked, node: fx.Node) -> bool:
    """Whether a softmax is over all experts, and over nothing else."""
    places = found.of(operand(node))
    assert places is not None and isinstance(node.args[1], int)
    return [digit.of for digit in places[node.args[1]]] == [EXPERT] and not has(places, CHOICE)


def _pointwise(node: fx.Node, known: dict[fx.Node, Number | None]) -> Number | None:
    if node.target in (aten.where.self, aten.where.ScalarOther) and known.get(operand(node)) is not None:
        taken = node.args[1] if known[operand(node)] else node.args[2]
        return known.get(taken) if isinstance(taken, fx.Node) else _number(taken)
    if node.target in (aten.masked_fill.Scalar,) and known.get(operand(node, 1)) is not None:
        return _number(node.args[2]) if known[operand(node, 1)] else known.get(operand(node))
    if all(known.get(source) is not None for source in node.all_input_nodes):
        return _computed(node, known)
    positions = {
        position for position, given in enumerate(node.args) if isinstance(given, fx.Node) and known.get(given) == 0
    }
    groups = linear_in(node.target)
    if any(all(place in positions or node.args[place : place + 1] == (0,) for place in group) for group in groups):
        return 0
    return None


def _computed(node: fx.Node, known: dict[fx.Node, Number | None]) -> Number | None:
    """The operator, on numbers."""

    def number_of(source: fx.Node) -> torch.Tensor:
        return torch.tensor(known[source], dtype=value(source).dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), number_of)
    assert is_overload(node.target) and callable(node.target)
    found = node.target(*args, **kwargs).item()
    return None if math.isnan(found) else _number(found)


def _number(given: object) -> Number | None:
    return given if isinstance(given, (int, float)) else None
