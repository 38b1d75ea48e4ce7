"""The flow of splits through a program: they spread from seeds along the factors that operators share.

A split of one tensor of an operator belongs to a factor of its rule, and so implies splits of its other tensors. A
policy gives the seeds (the batch dim of the inputs, or the dims of weights). Spreading them to the end finds every
split that is related to them, and no other: data parallelism never splits a weight, tensor parallelism never a batch.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopar.errors import UnknownOperatorError
from autopar.ir.layout import Partial, Split
from autopar.ir.node import origin, value, values
from autopar.ir.operator_facts import is_random
from autopar.ir.program import Program
from autopar.ir.reach import made_only_of
from autopar.ir.tables import InputKind
from autopar.rules import Rule, call_of, rule_for
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Part, Strategy
from autopar.rules.positions import PICKS

Key = tuple[fx.Node, int]  # a value: the node that produces it and the index among its outputs


def key_of(node: fx.Node) -> Key:
    """The value that a node produces; a ``getitem`` is an output of the node it reads."""
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        return source, index
    return node, 0


@dataclass
class Flow:
    """A program's calls with their factorings, and the splits found for each value and each call."""

    program: Program
    axis: str
    ways: int
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    factorings: dict[fx.Node, Factoring] = field(default_factory=dict)
    uses: dict[Key, list[tuple[fx.Node, int]]] = field(default_factory=dict)  # value -> (call, operand number)
    splits: dict[Key, dict[Split, None]] = field(default_factory=dict)
    parts: dict[fx.Node, dict[Part, Strategy]] = field(default_factory=dict)
    weights: frozenset[fx.Node] = frozenset()  # parameters and values computed from parameters alone
    fixed: frozenset[fx.Node] = frozenset()  # constants and what is made of them: cut at no cost, for each user anew
    further: dict[fx.Node, dict[Part, None]] = field(default_factory=dict)  # parts that only the second spread found
    # equal calls, as the layers of a model have, share a factoring, which ``factorings`` keeps alive
    _carriers: dict[tuple[int, int, Split], tuple[Part | None, Strategy | None]] = field(default_factory=dict)

    @cached_property
    def parameter_elements(self) -> int:
        """How many elements all parameters of the model have."""
        return sum(math.prod(value(node).shape) for node, _ in self.program.placeholders(InputKind.PARAMETER))

    @cached_property
    def only_used_whole(self) -> frozenset[fx.Node]:
        """The calls, products and sums aside, whose results nothing splits: all that use them must or may run whole."""
        returned = {key_of(node)[0] for node in self.program.returned}
        found: set[fx.Node] = set()
        for call in reversed(self.calls):
            users = [user for index in range(len(values(call))) for user, _ in self.uses.get((call, index), ())]
            whole = (user in found or not self.parts.get(user) or user.target in PICKS for user in users)
            sums = self.factorings[call].contraction or any(map(ends_partial, self.parts.get(call, {}).values()))
            if users and call not in returned and not sums and all(whole):
                found.add(call)
        return frozenset(found)

    def tensors(self, call: fx.Node) -> Iterator[tuple[Key, Dims]]:
        """Every operand and output of a call with its factors."""
        factoring = self.factorings[call]
        for operand, dims in zip(self.calls[call].operands, factoring.inputs):
            yield key_of(operand), dims
        for index, dims in enumerate(factoring.outputs):
            yield (call, index), dims

    def spread(self, seeds: Iterable[tuple[Key, Split]]) -> None:
        """Follow every seed through the calls that touch its value, forwards and backwards."""
        queue = deque(seeds)
        while queue:
            key, split = queue.popleft()
            known = self.splits.setdefault(key, {})
            if split in known:
                continue
            known[split] = None
            users = () if key[0] in self.fixed else self.uses.get(key, ())
            touching = [(call, self.factorings[call].inputs[i]) for call, i in users]
            if key[0] in self.factorings:
                touching.append((key[0], self.factorings[key[0]].outputs[key[1]]))
            for call, dims in touching:
                part, strategy = self._carrier(self.factorings[call], dims, split)
                if part is None or part in self.parts.setdefault(call, {}):
                    continue
                if strategy is None:
                    continue
                self.parts[call][part] = strategy
                queue.extend(self._implied(call, strategy))

    def _carrier(self, factoring: Factoring, dims: Dims, split: Split) -> tuple[Part | None, Strategy | None]:
        """The part of an operator to which a split of one of its tensors belongs, and the strategy that splits it."""
        key = id(factoring), id(dims), split
        if key not in self._carriers:
            part = factoring.part_of(dims, split, self.ways)
            self._carriers[key] = part, None if part is None else factoring.strategy(part, self.ways)
        return self._carriers[key]

    def spread_further(self, seeds: Iterable[tuple[Key, Split]]) -> None:
        """Spread as :meth:`spread` does, and note in ``further`` the parts that are new."""
        before = {call: set(parts) for call, parts in self.parts.items()}
        self.spread(seeds)
        for call, parts in self.parts.items():
            new = dict.fromkeys(part for part in parts if part not in before.get(call, ()))
            if new:
                self.further[call] = new

    def _implied(self, call: fx.Node, strategy: Strategy) -> Iterator[tuple[Key, Split]]:
        keys = [key for key, _ in self.tensors(call)]
        for key, placement in zip(keys, (*strategy.inputs, *strategy.outputs)):
            if isinstance(placement, Split):
                yield key, placement

    def carried(self, key: Key, split: Split, seen: dict[tuple[Key, Split], bool]) -> bool:
        """Whether some consumer keeps computing with this split, up to a contraction or the end of the program."""
        if (key, split) in seen:
            return seen[key, split]
        seen[key, split] = False
        uses = self.uses.get(key, [])
        returned = any(key_of(node) == key for node in self.program.returned)
        result = returned and not uses
        for call, position in uses:
            for strategy in self.parts.get(call, {}).values():
                if strategy.inputs[position] != split:
                    continue
                for index, placement in enumerate(strategy.outputs):
                    ends = not isinstance(placement, Split)
                    result = result or ends or self.carried((call, index), placement, seen)  # type: ignore[arg-type]
            if result:
                break
        seen[key, split] = result
        return result

    def blocked_by(self, key: Key, split: Split) -> tuple[fx.Node, int] | None:
        """The first consumer that cannot carry ``split`` because a factor does not divide, and that factor's size."""
        queue, seen = deque([(key, split)]), set()
        while queue:
            here, cut = queue.popleft()
            if (here, cut) in seen:
                continue
            seen.add((here, cut))
            for call, position in self.uses.get(here, ()):
                factoring = self.factorings[call]
                dims = factoring.inputs[position]
                if factoring.part_of(dims, cut, self.ways) is None:
                    sizes = [factoring.sizes[f] for f in dims[cut.dim] if f not in factoring.whole]
                    bad = [size for size in sizes if size % self.ways and size > 1]
                    if bad and len(sizes) > 1:
                        return call, bad[0]
                for strategy in self.parts.get(call, {}).values():
                    if strategy.inputs[position] == cut:
                        queue.extend(
                            ((call, i), out) for i, out in enumerate(strategy.outputs) if isinstance(out, Split)
                        )
        return None


def flow_of(program: Program, axis: str, rules: Mapping[Any, Rule] | None = None) -> Flow:
    """The calls of a program with their factorings.

    ``rules``: of this axis alone, by operator, in place of the usual ones.
    Raises UnknownOperatorError for an operator without a rule.
    """
    weights = weights_of(program)
    flow = Flow(program, axis, program.mesh.size(axis), weights=weights, fixed=_fixed(program))
    cache: dict[Any, Factoring] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        call = call_of(node, program.mesh, weights)
        flow.calls[node] = call
        flow.factorings[node] = _factoring(program, node, call, rules or {}, cache)
        for position, operand in enumerate(call.operands):
            flow.uses.setdefault(key_of(operand), []).append((node, position))
    return flow


def _factoring(
    program: Program, node: fx.Node, call: Call, rules: Mapping[Any, Rule], cache: dict[Any, Factoring]
) -> Factoring:
    plain = fx.node.map_arg((call.args, dict(call.kwargs)), lambda n: None)
    key = (call.target, repr(plain), call.inputs, call.outputs, call.diff_inputs, call.parameters)
    if key not in cache:
        rule = rules.get(call.target) or rule_for(call.target)
        if rule is None and program.plan.on_unknown != "replicate":
            raise UnknownOperatorError(_unknown(node))
        cache[key] = opaque(call) if rule is None else rule(call)
    return cache[key]


def refuse_other_draws(program: Program, rules: Mapping[Any, Rule] | None = None) -> None:
    """Raise UnknownOperatorError for an operator that draws by no positions: run whole, each rank would draw others."""
    for node in program.graph.nodes:
        if is_random(node.target) and not (rules or {}).get(node.target) and rule_for(node.target) is None:
            raise UnknownOperatorError(_unknown(node))


def _unknown(node: fx.Node) -> str:
    where = origin(node)
    found = (
        f"no splitting rule for the operator {node.target}\n"
        f"  node    {node.name}\n"
        f"  module  {where.module or '(top level)'}\n"
        f"  source  {where.source or '(unknown)'}\n"
    )
    if is_random(node.target):
        return (
            f"{found}It draws random numbers, and each rank would draw others.\n"
            "Way out: torch.rand, randn or bernoulli, which draw alike on any mesh: torch.rand(n).argsort() "
            "in place of torch.randperm(n), gumbel_softmax(logits, hard=True) in place of multinomial; or draw outside "
            "of the model, and pass it as an argument."
        )
    return (
        f'{found}Teach it with autopar.register_rule("{str(node.target).replace(".", "::", 1)}", "b s k, k -> b s") '
        '(one name per dim; docs/rules.md),\nor run it whole on every rank with Plan(on_unknown="replicate").'
    )


def opaque(call: Call) -> Factoring:
    """The factoring of an operator that can only be run whole."""
    names: list[str] = []

    def dims(tag: str, shape: tuple[int, ...]) -> Dims:
        names.extend(f"{tag}_{i}" for i in range(len(shape)))
        return tuple((f"{tag}_{i}",) for i in range(len(shape)))

    inputs = tuple(dims(f"in{k}", shape) for k, shape in enumerate(call.inputs))
    outputs = tuple(dims(f"out{k}", shape) for k, shape in enumerate(call.outputs))
    return Factoring(inputs, outputs, dict.fromkeys(names, ANY_SIZE), whole=frozenset(names))


def weights_of(program: Program) -> frozenset[fx.Node]:
    """Parameters and values computed from parameters alone."""
    parameters = (node for node, _ in program.placeholders(InputKind.PARAMETER))
    return frozenset(made_only_of(program.graph, parameters))


def _fixed(program: Program) -> frozenset[fx.Node]:
    """Values that depend on no input, parameter or buffer. One constant may count batches here and heads there."""
    constants = (node for node, _ in program.placeholders(InputKind.CONSTANT, InputKind.SEED))
    return frozenset(made_only_of(program.graph, constants, factories=True))


def ends_partial(strategy: Strategy) -> bool:
    return any(isinstance(placement, Partial) for placement in strategy.outputs)
