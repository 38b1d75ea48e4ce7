"""Split weights over ``tp``: columns then rows, attention by heads, the vocabulary of embedding, head and loss.

    up    = param up.weight                : f32[32,8]        up    = param up.weight               : f32[32@tp,8]
    down  = param down.weight              : f32[8,32]        down  = param down.weight             : f32[8,32@tp]
    h     = aten.linear(x, up)       : f32[4,32]       -->    enter = comm.enter(x, tp)             : f32[4,8]
    a     = aten.gelu(h)             : f32[4,32]              h     = aten.linear(enter, up)        : f32[4,32@tp]
    y     = aten.linear(a, down)     : f32[4,8]               a     = aten.gelu(h)                  : f32[4,32@tp]
                                                              y     = aten.linear(a, down)    : f32[4,8]{sum:tp}
                                                              sum   = comm.all_reduce(y, tp, sum)   : f32[4,8]

With ``Plan(sequence="megatron")`` activations between blocks are split along the sequence instead of held whole.
(Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.)
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import INVARIANT, Placement, Split
from autopar.ir.node import origin, value, values
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.rules.factoring import Part, Strategy
from autopar.split.choose import Choice
from autopar.split.flow import Flow, Key, ends_partial, key_of
from autopar.split.split_axis import split_axis

_AXIS = "tp"
_SMALL = 0.01  # a weight with less than this share of all parameter bytes may stay whole without an error
_TABLES = (torch.ops.aten.embedding.default, EMBEDDING_BAGS)
_ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default,)


@graph_pass()
def split_tensors(program: Program) -> Program:
    return split_axis(program, _TensorPolicy(dict(program.plan.tensor)), _refuse_whole_weights)


@dataclass(frozen=True)
class _TensorPolicy:
    overrides: Mapping[str, str]
    axis: str = _AXIS

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        """Every dim of a weight that a contraction uses."""
        for call, factoring in flow.factorings.items():
            if not factoring.contraction:
                continue
            for operand, dims in zip(flow.calls[call].operands, factoring.inputs):
                if operand in flow.weights:
                    for factor in {f for dim in dims for f in dim}:
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
            if call.target in _ATTENTION:
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
        """Weights are used as they lie: gathering them would be ZeRO-3 in disguise."""
        return key[0] not in flow.weights

    def allowed(self, flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
        weights = [i for i, operand in enumerate(flow.calls[call].operands) if operand in flow.weights]
        if not flow.factorings[call].contraction or not weights or len(weights) == len(flow.calls[call].operands):
            along = [s for s in strategies if s.part in flow.further.get(call, ())]
            split_on = along and any(v.requires_grad for v in values(call))
            return [s for s in strategies if s.part] if split_on else strategies
        main = weights[-1] if flow.calls[call].target is torch.ops.aten.addmm.default else weights[0]
        weight = flow.calls[call].operands[main]
        unsplit = [s for s in strategies if not s.part]
        splits = [s for s in strategies if s.part and isinstance(s.inputs[main], Split)]
        forced = self._override(flow, weight)
        if forced:
            return _forced(forced, splits, unsplit, flow, call)
        rows = [s for s in splits if ends_partial(s)]
        if rows and _looks_up_tokens(flow, call):
            return rows
        seen: dict[tuple[Key, Split], bool] = {}
        carried = [s for s in splits if ends_partial(s) or _whole_result(s) or _carried(flow, call, s, seen)]
        columns = len(carried) > len(rows)
        if not columns and (_fewer_heads_than_ranks(flow, call) or _is_small(flow, weight)):
            return [*carried, *unsplit]
        return carried or splits or unsplit

    def _override(self, flow: Flow, weight: fx.Node) -> str | None:
        return self.form(parameter_names(flow.program, weight))

    def form(self, names: Iterable[str]) -> str | None:
        """What ``Plan(tensor=...)`` asks of a parameter that goes by these names."""
        names = list(names)
        for pattern, form in self.overrides.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return form
        return None


def _looks_up_tokens(flow: Flow, call: fx.Node) -> bool:
    """Whether this is an embedding of a user's input (a vocabulary), not of positions or buckets."""
    if call.target is not torch.ops.aten.embedding.default:
        return False
    inputs = {node for node, _ in flow.program.placeholders(InputKind.INPUT)}
    queue, seen = [flow.calls[call].operands[1]], set[fx.Node]()
    while queue:
        node = queue.pop()
        if node in inputs:
            return True
        if node not in seen:
            seen.add(node)
            queue += node.all_input_nodes
    return False


def _carried(flow: Flow, call: fx.Node, strategy: Strategy, seen: dict[tuple[Key, Split], bool]) -> bool:
    return any(
        isinstance(placement, Split) and flow.carried((call, index), placement, seen)
        for index, placement in enumerate(strategy.outputs)
    )


def _whole_result(strategy: Strategy) -> bool:
    return not any(isinstance(placement, Split) for placement in strategy.outputs)


def _fewer_heads_than_ranks(flow: Flow, call: fx.Node) -> bool:
    """Whether the results are heads of which there are fewer than ranks, so that several ranks need the same one."""
    found = _blocked(flow, call)
    return found is not None and found[1] < flow.ways and flow.ways % found[1] == 0


def _blocked(flow: Flow, call: fx.Node) -> tuple[fx.Node, int] | None:
    for index, dims in enumerate(flow.factorings[call].outputs):
        for dim in range(len(dims)):
            if found := flow.blocked_by((call, index), Split(dim)):
                return found
    return None


def _is_small(flow: Flow, weight: fx.Node) -> bool:
    total = sum(math.prod(value(node).shape) for node, _ in flow.program.placeholders(InputKind.PARAMETER))
    return math.prod(value(weight).shape) < _SMALL * total


def _forced(form: str, splits: list[Strategy], unsplit: list[Strategy], flow: Flow, call: fx.Node) -> list[Strategy]:
    rows = call.target in _TABLES
    picked = {
        "replicate": unsplit,
        "column": [s for s in splits if not ends_partial(s)],
        "row": [s for s in splits if ends_partial(s)],
        "vocabulary": [s for s in splits if ends_partial(s) == rows],
    }[form]
    if not picked:
        shapes = flow.calls[call].inputs
        shape = shapes[0] if rows or len(shapes) == 1 else shapes[1]
        raise IndivisibleError(
            f"Plan(tensor=...) asks for '{form}' at {call.name} ({origin(call).module or call.target}), but no dim of "
            f"its weight {tuple(shape)} can be split that way over {flow.axis}={flow.ways}; "
            "choose another form, or a size that divides"
        )
    return picked


def parameter_names(program: Program, weight: fx.Node) -> list[str]:
    """The model's names of the parameters that ``weight`` is made of."""
    names: list[str] = []
    queue = [weight]
    while queue:
        node = queue.pop()
        if node.op == "placeholder":
            entry = program.input_of(node)
            names += [entry.target, *entry.aliases]
        queue += node.all_input_nodes
    return names


def _refuse_whole_weights(flow: Flow, choice: Choice) -> None:
    """Refuse a choice in which a weight of some size, or an attention, stayed whole because a dim does not divide."""
    policy = _TensorPolicy(flow.program.plan.tensor)
    for call, strategy in choice.strategies.items():
        if strategy.part or not flow.factorings[call].contraction:
            continue
        if call.target in _ATTENTION:
            _refuse_attention(flow, call, policy)
        for operand in flow.calls[call].operands:
            if operand in flow.weights and not policy._override(flow, operand) and not _is_small(flow, operand):
                _refuse_weight(flow, call, operand)
    if flow.program.plan.sequence == "megatron" and not flow.further:
        warnings.warn(
            f'Plan(sequence="megatron"): no sequence dim divides by {flow.axis}={flow.ways}; activations stay whole',
            stacklevel=2,
        )


def _refuse_attention(flow: Flow, call: fx.Node, policy: _TensorPolicy) -> None:
    heads = flow.calls[call].inputs[0][-3] if len(flow.calls[call].inputs[0]) > 2 else 1
    module = origin(call).module
    entries = [entry for _, entry in flow.program.placeholders(InputKind.PARAMETER)]
    projections = [(entry.target, *entry.aliases) for entry in entries if entry.target.startswith(f"{module}.")]
    asked = any(policy.form(names) == "replicate" for names in projections)
    if heads % flow.ways == 0 or asked:
        return  # its projections are kept whole on purpose
    _refuse(
        flow,
        f"attention at {module or call.name} has {heads} heads, which {flow.axis}={flow.ways} does not divide",
        f"Use a {flow.axis} size that divides {heads}, or keep its projections whole on every rank with "
        f"Plan(tensor={{'{module or '*'}.*': 'replicate'}}),\n"
        'or all that do not divide with Plan(on_indivisible="replicate").',
    )


def _refuse(flow: Flow, reason: str, way_out: str) -> None:
    """Raise, or with ``Plan(on_indivisible="replicate")`` warn, since it stayed whole on every rank."""
    if flow.program.plan.on_indivisible == "error":
        raise IndivisibleError(f"{reason}.\n{way_out}")
    warnings.warn(f"{reason}; every rank does it whole", stacklevel=2)


def _is_used_whole(flow: Flow, call: fx.Node, weight: fx.Node) -> bool:
    """Whether the rule offers no split of this weight, whatever its sizes (a recurrent layer)."""
    factoring = flow.factorings[call]
    dims = factoring.inputs[flow.calls[call].operands.index(weight)]
    return all(factor in factoring.whole for dim in dims for factor in dim)


def _refuse_weight(flow: Flow, call: fx.Node, weight: fx.Node) -> None:
    blocked = _blocked(flow, call)
    shape = value(weight).layout.local_shape(flow.program.mesh)
    name = parameter_names(flow.program, weight)[0]
    if _is_used_whole(flow, call, weight):
        _refuse(
            flow,
            f"parameter '{name}' cannot be split over {flow.axis}={flow.ways}: {call.name} "
            f"({origin(call).module or call.target}) needs the whole of it",
            f"Keep it whole on every rank with Plan(tensor={{'{name.rpartition('.')[0]}.*': 'replicate'}}),\n"
            'or all that cannot be split with Plan(on_indivisible="replicate"); dp splits the batch of it.',
        )
        return
    if blocked and not _fewer_heads_than_ranks(flow, call):
        consumer, size = blocked
        reason = f"its {size} parts (heads) at {consumer.name} ({origin(consumer).module}) do not divide by it"
    elif not blocked and all(size % flow.ways for size in shape):
        reason = f"no dim of its shape {tuple(shape)} divides by it"
    else:
        return  # fewer K/V heads than ranks: those heads are replicated
    _refuse(
        flow,
        f"parameter '{name}' cannot be split over {flow.axis}={flow.ways}: {reason}",
        f"Use a {flow.axis} size that divides, or keep it whole on every rank with "
        f"Plan(tensor={{'{name}': 'replicate'}}),\n"
        'or all that do not divide with Plan(on_indivisible="replicate").',
    )
