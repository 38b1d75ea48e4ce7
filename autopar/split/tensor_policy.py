"""The policy of tensor parallelism: which splits of weights an axis may use, and the forms of ``Plan(tensor=...)``.

A contraction with a weight is split by columns where later operators carry the split on, and by rows where they sum
over it. Everything else follows from that by the rules. (Shoeybi et al. 2019, section 3.)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autopar.ir.layout import INVARIANT, Placement, Split
from autopar.ir.node import value, values
from autopar.ir.reach import ancestors
from autopar.ir.tables import Input, InputKind
from autopar.operators import ATTENTIONS
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.rules import Rule
from autopar.rules.factoring import Part, Strategy
from autopar.split.choose import NO_RULES
from autopar.split.flow import Flow, Key, ends_partial, key_of
from autopar.split.obstacles import has_fewer_heads_than_ranks, is_small, parameter_names
from autopar.split.refusals import refuse_form

aten = torch.ops.aten
TABLES = (aten.embedding.default, EMBEDDING_BAGS)  # their weight is a table of rows: a vocabulary


@dataclass(frozen=True)
class TensorPolicy:
    """``overrides``: pattern of parameter names -> the form that the plan asks for; the first match counts.

    ``whole``: weights that are left whole, since what they belong to is dealt out whole.
    """

    overrides: Mapping[str, str]
    whole: frozenset[fx.Node] = frozenset()
    axis: str = "tp"
    rules: ClassVar[Mapping[Any, Rule]] = NO_RULES

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """Every dim of a weight that a contraction uses."""
        for call, factoring in flow.factorings.items():
            if not factoring.contraction:
                continue
            for operand, dims in zip(flow.calls[call].operands, factoring.inputs):
                if operand in flow.weights and operand not in self.whole:
                    for factor in dict.fromkeys(f for dim in dims for f in dim):  # in this order on all ranks
                        if factoring.allows(Part(factor), flow.ways):
                            yield from ((key_of(operand), split) for split in factoring.splits(Part(factor), dims))

    def further_seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """The sequence dim, for ``Plan(sequence="megatron")``."""
        if flow.program.plan.sequence != "megatron":
            return
        for node, _ in flow.program.placeholders(InputKind.INPUT):
            shape = value(node).shape
            if len(shape) in (2, 3) and shape[1] > 1 and not (len(shape) == 2 and value(node).dtype.is_floating_point):
                yield (node, 0), Split(1)
        for call in flow.calls:
            if call.target in ATTENTIONS:
                query = flow.calls[call].operands[0]
                yield key_of(query), Split(len(value(query).shape) - 2)

    def placements(self, flow: Flow, node: fx.Node, entry: Input) -> list[Placement]:
        if entry.kind is not InputKind.PARAMETER:
            return [INVARIANT]
        pinned = flow.program.pins.layouts.get(entry.target)
        if pinned is not None:
            return [pinned.placement(self.axis, flow.program.mesh)]
        return [INVARIANT, *flow.splits.get((node, 0), {})]

    def may_gather(self, flow: Flow, key: Key) -> bool:
        """Not for weights: they are used as they are laid out. Gathering them would be ZeRO-3 in disguise."""
        return key[0] not in flow.weights

    def allowed(self, flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
        """The strategies that ``call`` may use.

        For a contraction with a weight, those in the form that the plan asks for, else the suitable ones. For other
        calls, all of them; where a split along the sequence is possible, only splits.
        """
        position = _position_of_weight(flow, call)
        if position is None:
            return _along_the_sequence(flow, call, strategies)
        weight = flow.calls[call].operands[position]
        possible = _Strategies.of(strategies, position)
        if weight in self.whole:
            kept = [s for s in strategies if not isinstance(s.inputs[position], Split)]
            return _along_the_sequence(flow, call, kept)
        form = self.form(parameter_names(flow.program, weight))
        return _in_form(form, possible, flow, call, position) if form else _suitable(possible, flow, call, weight)

    def form(self, names: Iterable[str]) -> str | None:
        """The form that ``Plan(tensor=...)`` asks for, of a parameter with these names; None where it asks for none."""
        names = list(names)
        for pattern, form in self.overrides.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return form
        return None


@dataclass(frozen=True)
class _Strategies:
    """The strategies of a contraction, sorted by what they do with its weight."""

    unsplit: list[Strategy]
    splits: list[Strategy]

    @classmethod
    def of(cls, strategies: list[Strategy], position: int) -> _Strategies:
        """``position``: that of the weight among the operands. Splits that leave the weight whole are left out."""
        splits = [s for s in strategies if s.part and isinstance(s.inputs[position], Split)]
        return cls([s for s in strategies if not s.part], splits)

    @property
    def rows(self) -> list[Strategy]:
        """The splits along the summed dim."""
        return [s for s in self.splits if ends_partial(s)]

    @property
    def columns(self) -> list[Strategy]:
        return [s for s in self.splits if not ends_partial(s)]


def _position_of_weight(flow: Flow, call: fx.Node) -> int | None:
    """Which operand of a contraction is its weight; None for other calls, and for a product of weights alone."""
    operands = flow.calls[call].operands
    weights = [position for position, operand in enumerate(operands) if operand in flow.weights]
    if not flow.factorings[call].contraction or not weights or len(weights) == len(operands):
        return None
    return weights[-1] if call.target is aten.addmm.default else weights[0]  # addmm has its bias first


def _along_the_sequence(flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
    """The strategies that a call without a weight may use: where it can be split along the sequence, it must be."""
    along = any(s.part in flow.further.get(call, ()) for s in strategies)
    if along and any(kind.requires_grad for kind in values(call)):
        return [s for s in strategies if s.part]
    return strategies


def _in_form(form: str, possible: _Strategies, flow: Flow, call: fx.Node, position: int) -> list[Strategy]:
    """The strategies in ``form``. Raises IndivisibleError where there is none."""
    picked = {
        "replicate": possible.unsplit,
        "column": possible.columns,
        "row": possible.rows,
        "vocabulary": possible.rows if call.target in TABLES else possible.columns,
    }[form]
    if not picked:
        refuse_form(flow, call, form, flow.calls[call].inputs[position])
    return picked


def _suitable(possible: _Strategies, flow: Flow, call: fx.Node, weight: fx.Node) -> list[Strategy]:
    """The strategies where the plan asks for no form: a vocabulary by rows, else the splits that later operators carry.

    A weight that can only be split by rows, and that is small or has fewer heads than ranks, may stay whole.
    """
    if possible.rows and _looks_up_tokens(flow, call):
        return possible.rows
    carried = _carried_on(possible.splits, flow, call)
    by_rows_at_most = all(map(ends_partial, carried))
    if by_rows_at_most and (has_fewer_heads_than_ranks(flow, call) or is_small(flow, weight)):
        return [*carried, *possible.unsplit]
    return carried or possible.splits or possible.unsplit


def _carried_on(splits: list[Strategy], flow: Flow, call: fx.Node) -> list[Strategy]:
    """The splits whose result is whole, or a pending sum, or is split as later operators can carry it."""
    seen: dict[tuple[Key, Split], bool] = {}

    def carried(strategy: Strategy) -> bool:
        cut = [(index, p) for index, p in enumerate(strategy.outputs) if isinstance(p, Split)]
        if ends_partial(strategy) or not cut:
            return True
        return any(flow.carried((call, index), split, seen) for index, split in cut)

    return [strategy for strategy in splits if carried(strategy)]


def _looks_up_tokens(flow: Flow, call: fx.Node) -> bool:
    """Whether ``call`` is an embedding of a user's input (a vocabulary), not of positions or buckets."""
    if call.target is not aten.embedding.default:
        return False
    inputs = {node for node, _ in flow.program.placeholders(InputKind.INPUT)}
    return not inputs.isdisjoint(ancestors([flow.calls[call].operands[1]]))
