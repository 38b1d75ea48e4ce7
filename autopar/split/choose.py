"""The choice of a layout for every value on one axis: a cost model over strategies, solved exactly.

The model has one variable per call (its strategy), per placeholder (its placement) and per value with several
consumers (the set of placements in which it is held). A table between two variables holds the cost of the collectives
that lead from the placement one produces to the placement the other requires.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from torch import fx

from autopar.cost.machine import FLOPS
from autopar.ir.layout import INVARIANT, PARTIAL, Partial, Placement, Split
from autopar.ir.node import Value, values
from autopar.ir.tables import Decision, Input, InputKind, OutputKind
from autopar.rules import Rule
from autopar.rules.factoring import Call, Factoring, Strategy
from autopar.split.conversions import BIG, ELEMENTWISE, PENDING, WHOLE_PARAMETER, normalised, plan_placements
from autopar.split.cost_model import CostModel, Table
from autopar.split.equal_calls import equal_nodes
from autopar.split.flow import Flow, Key, key_of
from autopar.split.solve import minimise

OTHERWISE = 10.0  # seconds: for another choice than the pinned one; all of them cost less than one that is impossible
NO_RULES: Mapping[Any, Rule] = MappingProxyType({})


class Policy(Protocol):
    """The purpose of one axis: the splits it may use, as hard constraints."""

    @property
    def axis(self) -> str:
        """The mesh axis."""

    @property
    def rules(self) -> Mapping[Any, Rule]:
        """Rules of this axis alone, by operator, in place of the usual ones."""

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """The splits from which all others on this axis follow."""

    def further_seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """Splits to spread after the seeds; ``Flow.further`` lists what they added."""

    def placements(self, flow: Flow, node: fx.Node, entry: Input) -> list[Placement]:
        """The placements that a placeholder may have."""

    def may_gather(self, flow: Flow, key: Key) -> bool:
        """Whether a value that is split may be gathered again."""

    def allowed(self, flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
        """The strategies that a call may use, among all that its rule allows."""


@dataclass(frozen=True)
class Choice:
    """The result: a strategy per call, a placement per placeholder and per returned value."""

    strategies: Mapping[fx.Node, Strategy]
    placeholders: Mapping[fx.Node, Placement]
    returned: tuple[Placement, ...]
    decisions: Mapping[str, Decision]


@dataclass(frozen=True)
class Edge:
    """What determines the cost of converting a value, apart from its two placements."""

    size: int  # bytes
    gradient: bool
    ways: int
    pinned: bool  # a split value must be used as it is split: it is never gathered


Produced = tuple[Placement, ...]  # by a variable, per choice
Required = tuple[frozenset[Placement], ...]  # of one operand, per choice


@dataclass
class _Variable:
    """One variable of the cost model, as its neighbours see it: what it produces, and what it requires of operands."""

    number: int
    domain: list[Strategy]
    required: dict[Key, Required]


def choose(flow: Flow, policy: Policy) -> Choice:
    """The cheapest layouts that the policy allows."""
    return _Chooser(flow, policy).run()


class _Chooser:
    def __init__(self, flow: Flow, policy: Policy) -> None:
        self.flow, self.policy, self.model = flow, policy, CostModel()
        self.variables: dict[Any, _Variable] = {}
        self.domains: dict[Any, list[Strategy]] = {}
        self.pinned = flow.program.pins.choices.get(policy.axis, {})
        self.consumers: dict[Key, list[_Variable]] = {}
        self.types: dict[Key, Value] = {}
        self.hubs: dict[Key, tuple[int, Required]] = {}  # variables of values, and their sets
        self.known = _Known()

    def run(self) -> Choice:
        program = self.flow.program
        for node, entry in program.placeholders(*InputKind):
            self._add_placeholder(node, entry)
        for call in self.flow.calls:
            self._add_call(call)
        for index, node in enumerate(program.returned):
            self._add_returned(index, node)
        for key, consumers in self.consumers.items():
            self._connect(key, consumers)
        picked = minimise(self.model, self._alike)
        chosen = {owner: self.domains[owner][picked[v.number]] for owner, v in self.variables.items()}
        calls = {call: chosen[call] for call in self.flow.calls}
        inputs = {node: chosen[node].outputs[0] for node, _ in program.placeholders(*InputKind)}
        returned = tuple(chosen["returned", i].inputs[0] for i in range(len(program.returned)))
        return Choice(calls, inputs, returned, self._decisions(picked))

    def _register(self, owner: Any, domain: list[Strategy], operands: Iterable[fx.Node], costs: list[float]) -> None:
        keys = [key_of(node) for node in operands]
        gradient = tuple([values(node)[0].requires_grad for node in operands])
        first = tuple(map(keys.index, keys))  # for each operand, the one that is the same value
        required = {keys[place]: wanted for place, wanted in self.known.required(domain, first, gradient).items()}
        variable = _Variable(self.model.variable(len(domain)), domain, required)
        self.variables[owner], self.domains[owner] = variable, domain
        self.model.add([variable.number], self._as_pinned(owner, domain, costs))
        for key in required:
            self.consumers.setdefault(key, []).append(variable)

    def _as_pinned(self, owner: Any, domain: list[Strategy], costs: list[float]) -> list[float]:
        """``costs``, with which another program's choice is kept wherever that is possible."""
        pinned = self.pinned.get(owner.name) if isinstance(owner, fx.Node) else None
        labels = self.known.labels(domain) if pinned is not None else []
        if pinned not in labels:
            return costs
        return [cost + OTHERWISE * (label != pinned) for label, cost in zip(labels, costs)]

    def _add_placeholder(self, node: fx.Node, entry: Input) -> None:
        self.types[node, 0] = values(node)[0]
        placements = self.policy.placements(self.flow, node, entry)
        size = _bytes(self.flow, values(node)[0]) if entry.kind is InputKind.PARAMETER else 0
        costs = [0.0 if isinstance(p, Split) else size * WHOLE_PARAMETER for p in placements]
        self._register(node, [Strategy(str(p), (), (p,)) for p in placements], (), costs)

    def _add_call(self, call: fx.Node) -> None:
        for index, value in enumerate(values(call)):
            self.types[call, index] = value
        domain = self.known.one_of(self.policy.allowed(self.flow, call, self.known.possible(self.flow, call)))
        work = work_of(self.flow.factorings[call], self.flow.calls[call])
        costs = [work * s.share + 1e-12 * i + PENDING * (s.label == "partial") for i, s in enumerate(domain)]
        self._register(call, domain, self.flow.calls[call].operands, costs)

    def _add_returned(self, index: int, node: fx.Node) -> None:
        output = self.flow.program.outputs[index]
        full = output.kind is not OutputKind.USER or self.flow.program.gathers_outputs
        found = {} if full or not values(node)[0].shape else self.flow.splits.get(key_of(node), {})
        # of what is in zig-zag order the user gets parts in plain order, never the whole, however small it is here
        reordered = dict.fromkeys(Split(split.dim) for split in found if split.mirrored)
        placements: list[Placement] = [*reordered] or [INVARIANT, *found]
        costs = [0.0] * len(placements)
        self._register(("returned", index), [Strategy(str(f), (f,), ()) for f in placements], (node,), costs)

    def _connect(self, key: Key, consumers: list[_Variable]) -> None:
        """Add the tables for the collectives between the producer of a value and its consumers."""
        producer = self.variables[key[0]]
        value = self.types[key]
        pinned = not self.policy.may_gather(self.flow, key)
        edge = Edge(_bytes(self.flow, value), value.requires_grad, self.flow.ways, pinned)
        produced = self.known.produced(producer.domain, key[1], edge.gradient)
        if set(produced) == {INVARIANT} and not edge.gradient:
            return  # whole and without gradient: every conversion is free
        if len(consumers) == 1:
            required = consumers[0].required[key]
            self.model.add((producer.number, consumers[0].number), self.known.table(produced, required, edge))
            return
        sets = self.known.sets([consumer.required[key] for consumer in consumers])
        hub = self.model.variable(len(sets))
        self.hubs[key] = hub, sets
        self.model.add((producer.number, hub), self.known.table(produced, sets, edge))
        for consumer in consumers:
            self.model.add((hub, consumer.number), self.known.covers(sets, consumer.required[key]))

    def _wanted(self, node: fx.Node) -> Hashable:
        """What a plan, or another program, wants of ``node``: it is wanted of this block, and of no other."""
        domain = self.domains.get(node, []) if node.op == "placeholder" else []
        return self.pinned.get(node.name), tuple(strategy.outputs for strategy in domain)

    def _alike(self) -> list[list[int]]:
        """The variables of equal nodes of equal blocks that have the same values."""
        groups: dict[Any, list[int]] = {}
        for place, nodes in enumerate(equal_nodes(self.flow.program.graph, self._wanted)):
            for node in nodes:
                if node in self.variables:
                    domain = tuple((s.inputs, s.outputs) for s in self.domains[node])
                    groups.setdefault((place, domain), []).append(self.variables[node].number)
                for index in range(len(values(node))):
                    if (node, index) in self.hubs:
                        hub, sets = self.hubs[node, index]
                        groups.setdefault((place, index, sets), []).append(hub)
        return [group for group in groups.values() if len(group) > 1]

    def _decisions(self, picked: list[int]) -> dict[str, Decision]:
        """For each call, the choice and the extra cost of each alternative while all else stays as chosen."""
        touching: dict[int, list[tuple[tuple[int, ...], Table]]] = {}
        for scope, table in self.model.tables:
            for number in scope:
                touching.setdefault(number, []).append((scope, table))
        decisions: dict[str, Decision] = {}
        for owner, variable in self.variables.items():
            if not isinstance(owner, fx.Node) or len(self.domains[owner]) < 2:
                continue
            totals = np.zeros(len(self.domains[owner]))
            for scope, table in touching[variable.number]:
                where = tuple(slice(None) if v == variable.number else picked[v] for v in scope)
                totals += table[where]
            least = totals[picked[variable.number]]
            labels = self.known.labels(self.domains[owner])
            others = {
                label: ("not possible here" if extra > BIG / 2 else float(extra))
                for i, (label, extra) in enumerate(zip(labels, totals - least))
                if i != picked[variable.number]
            }
            decisions[owner.name] = Decision(labels[picked[variable.number]], others)
        return decisions


class _Known:
    """What was worked out for one call, for those like it: all by ids, of what is held in here.

    Equal calls, as the layers of a model have, share a factoring and its strategies. To compare all that their domains
    and tables are made of takes longer than all else that is asked of them.
    """

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._held: list[Any] = []

    def _once(self, key: Any, held: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
            self._held.append(held)
        return self._made[key]

    def possible(self, flow: Flow, call: fx.Node) -> list[Strategy]:
        """The strategies of ``call``, of which its policy allows some."""
        factoring, parts = flow.factorings[call], list(flow.parts.get(call, {}).values())
        looks = tuple([(value.requires_grad, value.dtype) for value in values(call)])
        key = "possible", id(factoring), tuple(map(id, parts)), looks

        def make() -> list[Strategy]:
            return distinct([*factoring.unsplit(flow.calls[call]), *parts], values(call))

        found: list[Strategy] = self._once(key, (factoring, parts), make)
        return found

    def one_of(self, domain: list[Strategy]) -> list[Strategy]:
        """The first list of these strategies."""
        found: list[Strategy] = self._once(("domain", *map(id, domain)), domain, lambda: domain)
        return found

    def labels(self, domain: list[Strategy]) -> list[str]:
        """In the words of decisions."""
        found: list[str] = self._once(("labels", id(domain)), domain, lambda: list(map(_label, domain)))
        return found

    def required(
        self, domain: list[Strategy], first: tuple[int, ...], gradient: tuple[bool, ...]
    ) -> dict[int, Required]:
        """For each operand, those that are the same value together, the placements that each choice requires of it.

        ``first``: for each operand the first one that is the same value; ``gradient``: whether one flows to it.
        """

        def make() -> dict[int, Required]:
            found: dict[int, Required] = {}
            for place, (one, flows) in enumerate(zip(first, gradient)):
                wanted = tuple(frozenset((normalised(strategy.inputs[place], flows),)) for strategy in domain)
                found[one] = tuple(map(operator.or_, found[one], wanted)) if one in found else wanted
            return found

        made: dict[int, Required] = self._once(("required", id(domain), first, gradient), domain, make)
        return made

    def produced(self, domain: list[Strategy], index: int, gradient: bool) -> Produced:
        """The placements that the choices give an output."""
        key = "produced", id(domain), index, gradient
        make = lambda: tuple(normalised(strategy.outputs[index], gradient) for strategy in domain)  # noqa: E731
        found: Produced = self._once(key, domain, make)
        return found

    def sets(self, required: Sequence[Required]) -> Required:
        """The sets of placements in which a value may be held of which its consumers require these."""
        key = "sets", *map(id, required)
        make = lambda: _placement_sets({needed for each in required for needed in each})  # noqa: E731
        found: Required = self._once(key, required, make)
        return found

    def table(self, produced: Produced, required: Required, edge: Edge) -> Table:
        key = "table", id(produced), id(required), edge
        found: Table = self._once(key, (produced, required), lambda: _table(produced, required, edge))
        return found

    def covers(self, sets: Required, required: Required) -> Table:
        key = "covers", id(sets), id(required)
        found: Table = self._once(key, (sets, required), lambda: _covers(sets, required))
        return found


def _label(strategy: Strategy) -> str:
    inputs = ", ".join(map(str, strategy.inputs))
    return f"{strategy.label}: {inputs} -> {', '.join(map(str, strategy.outputs))}" if strategy.part else strategy.label


def distinct(strategies: list[Strategy], types: tuple[Value, ...]) -> list[Strategy]:
    """The strategies without those that are equal: without a gradient, replicated is the same as invariant."""
    if not any(value.requires_grad for value in types):
        strategies = [s for s in strategies if s.label != "replicated"]
    floating = all(value.dtype.is_floating_point or value.dtype.is_complex for value in types)
    if not floating:  # counts may be partial, but booleans and indices cannot
        strategies = [s for s in strategies if s.label != "partial" or not any(p == PARTIAL for p in s.outputs)]
        narrow = [value.dtype.itemsize == 1 for value in types]
        strategies = [s for s in strategies if not any(isinstance(p, Partial) and n for p, n in zip(s.outputs, narrow))]
    return list({(s.inputs, s.outputs): s for s in strategies}.values())


def work_of(factoring: Factoring, call: Call) -> float:
    """Seconds for the whole operator: the multiply-adds of a contraction, forward and backward; else almost nothing."""
    if factoring.contraction:
        work = math.prod(factoring.sizes.values()) if factoring.work is None else factoring.work
        return 6.0 * work / FLOPS
    return ELEMENTWISE * sum(math.prod(shape) for shape in call.outputs)


def _bytes(flow: Flow, value: Value) -> int:
    return math.prod(value.layout.local_shape(flow.program.mesh)) * value.dtype.itemsize


def _placement_sets(required: set[frozenset[Placement]]) -> Required:
    """The sets of placements in which a value may be held: those required, and unions of two or three of them."""
    placements = frozenset[Placement]().union(*required)
    largest = 3 if len(required) <= 6 else 2
    sets: dict[frozenset[Placement], None] = {}
    for count in range(1, largest + 1):
        for group in itertools.combinations(sorted(required, key=lambda s: (len(s), sorted(map(str, s)))), count):
            sets[frozenset().union(*group)] = None
    if len(placements) <= 4:
        sets[placements] = None
    return tuple(sets)


@lru_cache(maxsize=4096)
def _table(produced: Produced, required: Required, edge: Edge) -> Table:
    def cost(source: Placement, needed: frozenset[Placement]) -> float:
        if edge.pinned and isinstance(source, Split) and needed != {source}:
            return BIG
        return plan_placements(source, needed, edge.size, edge.gradient, edge.ways)[0]

    return np.array([[cost(source, needed) for needed in required] for source in produced])


@lru_cache(maxsize=4096)
def _covers(sets: Required, required: Required) -> Table:
    return np.array([[0.0 if needed <= have else BIG for needed in required] for have in sets])
