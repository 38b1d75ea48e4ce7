"""The policy of sequence parallelism: the sequence dims, and how attention calls are run on parts of them.

The sequence dims are found from the attention operators: dim -2 of their queries, keys and values, spread backwards to
the inputs and forwards to the loss. All else follows by the usual rules. An attention is split along its queries, with
keys and values as its form says (:mod:`autopar.split.attention_forms`), or by heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar.ir.layout import INVARIANT, Placement, Split
from autopar.ir.node import value
from autopar.ir.tables import Input, InputKind
from autopar.mesh import inner, outer
from autopar.operators import ATTENTIONS, hybrid_attention, ring_attention, rows_attention
from autopar.rules import Rule, positions, rule_for
from autopar.rules.factoring import Call, Dims, Emit, Factoring, Part, Strategy
from autopar.split.attention_call import AttentionCall
from autopar.split.attention_forms import Form, Forms
from autopar.split.flow import Flow, Key, ends_partial, key_of

QUERIES, KEYS = "s", "t"  # the factors of the rule for attention
MANY_ROWS = 4  # of one value, each a sum over all ranks


@dataclass(frozen=True)
class SequencePolicy:
    """How an axis splits the sequence.

    ``dims``: sequence dims, as (value, dim), from which all others follow. ``given``: with ``Plan(inputs="local")``
    those of the inputs, of which each rank passes one contiguous part.
    """

    axis: str
    forms: Forms
    dims: tuple[tuple[Key, int], ...]
    given: Mapping[fx.Node, int]

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return {**positions.rules_along(self.split(0)), **dict.fromkeys(ATTENTIONS, self._rule)}

    def split(self, dim: int) -> Split:
        """The split of a sequence dim: plain, or in zig-zag order."""
        return Split(dim, outer=2, mirrored=True) if self.forms.mirrored else Split(dim)

    def _rule(self, call: Call) -> Factoring:
        known = rule_for(call.target)
        assert known is not None, call.target
        factoring, form = known(call), self.forms.form(call)
        if form.kind == "ulysses":
            return factoring
        settings = {name: getattr(factoring, name) for name in Factoring.__dataclass_fields__}
        settings["whole"] = factoring.whole - {QUERIES}
        settings["rewrites"] = {QUERIES: _Written(form, self.forms.mirrored)}
        return _Along(**settings, order=self.split(0), keys_too=form.kind != "gather")

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        yield from ((key, self.split(dim)) for key, dim in self.dims)
        yield from (((node, 0), Split(dim)) for node, dim in self.given.items())

    def further_seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """The heads of attention calls in the form that deals them out, within those that each rank of ``tp`` has."""
        tensor_ways = flow.program.mesh.size("tp")
        for node, call in flow.calls.items():
            if node.target in ATTENTIONS and self.forms.form(call).kind == "ulysses":
                yield key_of(call.operands[0]), Split(len(call.inputs[0]) - 3, outer=tensor_ways)

    def may_gather(self, flow: Flow, key: Key) -> bool:
        return True

    def placements(self, flow: Flow, node: fx.Node, entry: Input) -> list[Placement]:
        if entry.kind is not InputKind.INPUT:
            return [INVARIANT]
        if node in self.given:
            return [Split(self.given[node])]
        return [*flow.splits.get((node, 0), {}), INVARIANT]

    def allowed(self, flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
        """Every call that can be split along the sequence is; by heads, only attention in that form."""
        heads = flow.further.get(call, {})
        if call.target in ATTENTIONS and heads:
            return [s for s in strategies if s.part in heads]
        strategies = [s for s in strategies if s.part is None or s.part not in heads]
        if _picks_many(flow, call):
            return [s for s in strategies if s.part is None and not ends_partial(s)]
        if call.target in positions.PICKS or call in flow.only_used_whole:  # the cheaper way
            return strategies
        return [s for s in strategies if s.part] or strategies


def _picks_many(flow: Flow, call: fx.Node) -> bool:
    """Whether ``call`` picks a row of a value of which many are picked (a loop over positions): of the whole, then."""
    if call.target not in positions.PICKS:
        return False
    users = flow.uses[key_of(flow.calls[call].operands[0])]
    return sum(user.target in positions.PICKS for user, _ in users) > MANY_ROWS


@dataclass(frozen=True)
class _Along(Factoring):
    """Attention of which the queries are split along the sequence; ``keys_too``: keys and values as the queries are.

    ``order``: the one way to split them, by which ranks know the positions of their rows.
    """

    order: Split = Split(0)
    keys_too: bool = False

    def part_of(self, tensor: Dims, split: Split, ways: int) -> Part | None:
        if self.keys_too and tensor[split.dim] == (KEYS,):
            part = Part(QUERIES, split.outer, split.ratio, split.mirrored)
            return part if self.allows(part, ways) else None
        return super().part_of(tensor, split, ways)

    def allows(self, part: Part, ways: int) -> bool:
        if part.factor == QUERIES:
            if Split(0, part.outer, part.ratio, part.mirrored) != self.order:
                return False
            if self.keys_too and not self.order.divides(self.sizes[KEYS], ways):
                return False
        return super().allows(part, ways)

    def strategy(self, part: Part, ways: int) -> Strategy | None:
        found = super().strategy(part, ways)
        if found is None or part.factor != QUERIES or not self.keys_too:
            return found
        inputs = list(found.inputs)
        for position in (1, 2):  # keys and values
            inputs[position] = Split(len(self.inputs[position]) - 2, part.outer, part.ratio, part.mirrored)
        return replace(found, inputs=tuple(inputs))


@dataclass(frozen=True)
class _Written:
    """Writes an attention call on its part of the sequence as the composite of its form."""

    form: Form
    mirrored: bool

    def __call__(self, emit: Emit, node: fx.Node, axis: str, ways: int) -> fx.Node:
        call, form = AttentionCall.of(node), self.form
        operands = (call.query, call.key, call.value)
        vectors, hidden = list(call.vectors), (self.mirrored, call.where)
        if form.kind == "gather":
            rows = (ways, *hidden, call.scale)
            return emit(rows_attention, (*operands, call.bias, vectors, emit.axis_index(axis), *rows), value(node))
        if form.kind == "ring":
            settings = (axis, ways, *hidden, list(form.steps), call.scale)
            return emit(ring_attention, (*operands, call.bias, vectors, emit.axis_index(axis), *settings), value(node))
        neighbours, groups = inner(axis, form.heads), outer(axis, ways // form.heads)
        ring = (neighbours, groups, form.heads, ways // form.heads, *hidden, list(form.steps), call.scale)
        return emit(hybrid_attention, (*operands, vectors, emit.axis_index(groups), *ring), value(node))
