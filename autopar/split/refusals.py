"""Refusals because a dim does not divide: a weight or an attention that stayed whole, a form the plan asks for.

With ``Plan(on_indivisible="replicate")`` a weight or attention that stayed whole is a warning, and so it is by default
where these are few of the model's parameters (the attention of one head in the middle of a VAE). Each message names
the thing, the sizes and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.node import origin, value
from autopar.ir.tables import Input, InputKind
from autopar.notes import warn
from autopar.operators import ATTENTIONS
from autopar.split.choose import Choice
from autopar.split.flow import Flow
from autopar.split.obstacles import (
    blocked,
    has_fewer_heads_than_ranks,
    is_small,
    is_used_whole,
    parameter_names,
)

MOST_WHOLE = 0.2  # of the parameters' elements: more than this many stay whole only where the plan says so

Form = Callable[[Iterable[str]], str | None]  # the names of a parameter -> the form that the plan asks for


def refuse_form(flow: Flow, call: fx.Node, form: str, shape: tuple[int, ...]) -> NoReturn:
    """Raise IndivisibleError: the weight of ``call``, of this ``shape``, has no dim that can be split in ``form``."""
    raise IndivisibleError(
        f"Plan(tensor=...) asks for '{form}' at {call.name} ({origin(call).module or call.target}), but no dim of "
        f"its weight {tuple(shape)} can be split that way over {flow.axis}={flow.ways}; "
        "choose another form, or a size that divides"
    )


def refuse_whole_weights(flow: Flow, choice: Choice, form: Form) -> None:
    """Refuse a choice in which a large weight, or an attention, stayed whole because a dim does not divide.

    Raises IndivisibleError, or warns: with ``Plan(on_indivisible="replicate")``, and by default where these are few.
    """
    found = list(_refusals(flow, choice, form))
    kept = {name: size for refusal in found for name, size in refusal.weights.items()}
    few = sum(kept.values()) <= MOST_WHOLE * flow.parameter_elements
    chosen = flow.program.plan.on_indivisible
    for refusal in found:
        if chosen == "error" or (chosen == "auto" and not few):
            raise IndivisibleError(f"{refusal.reason}.\n{refusal.way_out}")
        warn(f"{refusal.reason}; every rank does it whole", stacklevel=2)
    if flow.program.plan.sequence == "megatron" and not flow.further:
        warn(
            f'Plan(sequence="megatron"): no sequence dim divides by {flow.axis}={flow.ways}; activations stay whole',
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Refusal:
    """``weights``: what stays whole for this reason, with their elements."""

    reason: str
    way_out: str
    weights: Mapping[str, int]


def _refusals(flow: Flow, choice: Choice, form: Form) -> Iterator[_Refusal]:
    for call, strategy in choice.strategies.items():
        if strategy.part or not flow.factorings[call].contraction:
            continue
        if call.target in ATTENTIONS:
            yield from _of_attention(flow, call, form)
        for operand in flow.calls[call].operands:
            if operand not in flow.weights or is_small(flow, operand):
                continue
            if not form(parameter_names(flow.program, operand)):  # else it is as the plan asks
                yield from _of_weight(flow, call, operand)


def _of_attention(flow: Flow, call: fx.Node, form: Form) -> Iterator[_Refusal]:
    heads = flow.calls[call].inputs[0][-3] if len(flow.calls[call].inputs[0]) > 2 else 1
    module = origin(call).module
    owner, own = _projections(flow, call)
    asked = any(form((entry.target, *entry.aliases)) == "replicate" for entry in own)
    if heads % flow.ways == 0 or asked:
        return  # the plan keeps its projections whole on purpose
    yield _Refusal(
        f"attention at {module or call.name} has {heads} heads, which {flow.axis}={flow.ways} does not divide",
        f"Use a {flow.axis} size that divides {heads}, or keep its projections whole on every rank with "
        f"Plan(tensor={{'{f'{owner}.*' if owner else '*'}': 'replicate'}}),\n"
        'or all that do not divide with Plan(on_indivisible="replicate").',
        {entry.target: math.prod(value(node).shape) for entry, node in own.items()},
    )


def _projections(flow: Flow, call: fx.Node) -> tuple[str, dict[Input, fx.Node]]:
    """The module of an attention, or the nearest one around it that has parameters; and these.

    Of an attention that is written into the whole model: the weights from which its queries, keys and values come.
    """
    module = origin(call).module
    entries = [(entry, node) for node, entry in flow.program.placeholders(InputKind.PARAMETER)]
    while module:
        if own := {entry: node for entry, node in entries if entry.target.startswith(f"{module}.")}:
            return module, own
        module = module.rpartition(".")[0]
    names = {name for weight in _behind(flow, call) for name in parameter_names(flow.program, weight)}
    return "", {entry: node for entry, node in entries if entry.target in names}


def _behind(flow: Flow, call: fx.Node) -> set[fx.Node]:
    """The weights of the products whose results reach ``call`` by way of no other product."""
    found: set[fx.Node] = set()
    seen, left = {call}, list(call.all_input_nodes)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in flow.factorings and flow.factorings[node].contraction:
            found.update(operand for operand in flow.calls[node].operands if operand in flow.weights)
        else:
            left += node.all_input_nodes
    return found


def _of_weight(flow: Flow, call: fx.Node, weight: fx.Node) -> Iterator[_Refusal]:
    found = blocked(flow, call)
    shape = value(weight).layout.local_shape(flow.program.mesh)
    name = parameter_names(flow.program, weight)[0]
    size_of = {name: math.prod(value(weight).shape)}
    if is_used_whole(flow, call, weight):
        yield _Refusal(
            f"parameter '{name}' cannot be split over {flow.axis}={flow.ways}: {call.name} "
            f"({origin(call).module or call.target}) needs the whole of it",
            f"Keep it whole on every rank with Plan(tensor={{'{name.rpartition('.')[0]}.*': 'replicate'}}),\n"
            'or all that cannot be split with Plan(on_indivisible="replicate"); dp splits the batch of it.',
            size_of,
        )
        return
    if found and not has_fewer_heads_than_ranks(flow, call):
        consumer, size = found
        reason = f"its {size} parts (heads) at {consumer.name} ({origin(consumer).module}) do not divide by it"
    elif not found and all(size % flow.ways for size in shape):
        reason = f"no dim of its shape {tuple(shape)} divides by it"
    else:
        return  # fewer K/V heads than ranks: those heads are replicated
    yield _Refusal(
        f"parameter '{name}' cannot be split over {flow.axis}={flow.ways}: {reason}",
        f"Use a {flow.axis} size that divides, or keep it whole on every rank with "
        f"Plan(tensor={{'{name}': 'replicate'}}),\n"
        'or all that do not divide with Plan(on_indivisible="replicate").',
        size_of,
    )
