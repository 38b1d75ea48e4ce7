"""Refusals because a dim does not divide: a weight or an attention that stayed whole, a form the plan asks for.

With ``Plan(on_indivisible="replicate")`` a weight or attention that stayed whole is a warning. Each message names the
thing, the sizes and the way out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NoReturn

from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.node import origin, value
from autopar.ir.tables import InputKind
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

    Raises IndivisibleError, or warns with ``Plan(on_indivisible="replicate")``.
    """
    for call, strategy in choice.strategies.items():
        if strategy.part or not flow.factorings[call].contraction:
            continue
        if call.target in ATTENTIONS:
            _refuse_attention(flow, call, form)
        for operand in flow.calls[call].operands:
            if operand not in flow.weights or is_small(flow, operand):
                continue
            if not form(parameter_names(flow.program, operand)):  # else it is as the plan asks
                _refuse_weight(flow, call, operand)
    if flow.program.plan.sequence == "megatron" and not flow.further:
        warnings.warn(
            f'Plan(sequence="megatron"): no sequence dim divides by {flow.axis}={flow.ways}; activations stay whole',
            stacklevel=2,
        )


def _refuse_attention(flow: Flow, call: fx.Node, form: Form) -> None:
    heads = flow.calls[call].inputs[0][-3] if len(flow.calls[call].inputs[0]) > 2 else 1
    module = origin(call).module
    entries = [entry for _, entry in flow.program.placeholders(InputKind.PARAMETER)]
    projections = [(entry.target, *entry.aliases) for entry in entries if entry.target.startswith(f"{module}.")]
    asked = any(form(names) == "replicate" for names in projections)
    if heads % flow.ways == 0 or asked:
        return  # the plan keeps its projections whole on purpose
    _refuse(
        flow,
        f"attention at {module or call.name} has {heads} heads, which {flow.axis}={flow.ways} does not divide",
        f"Use a {flow.axis} size that divides {heads}, or keep its projections whole on every rank with "
        f"Plan(tensor={{'{module or '*'}.*': 'replicate'}}),\n"
        'or all that do not divide with Plan(on_indivisible="replicate").',
    )


def _refuse_weight(flow: Flow, call: fx.Node, weight: fx.Node) -> None:
    found = blocked(flow, call)
    shape = value(weight).layout.local_shape(flow.program.mesh)
    name = parameter_names(flow.program, weight)[0]
    if is_used_whole(flow, call, weight):
        _refuse(
            flow,
            f"parameter '{name}' cannot be split over {flow.axis}={flow.ways}: {call.name} "
            f"({origin(call).module or call.target}) needs the whole of it",
            f"Keep it whole on every rank with Plan(tensor={{'{name.rpartition('.')[0]}.*': 'replicate'}}),\n"
            'or all that cannot be split with Plan(on_indivisible="replicate"); dp splits the batch of it.',
        )
        return
    if found and not has_fewer_heads_than_ranks(flow, call):
        consumer, size = found
        reason = f"its {size} parts (heads) at {consumer.name} ({origin(consumer).module}) do not divide by it"
    elif not found and all(size % flow.ways for size in shape):
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


def _refuse(flow: Flow, reason: str, way_out: str) -> None:
    """Raise IndivisibleError, or warn with ``Plan(on_indivisible="replicate")``."""
    if flow.program.plan.on_indivisible == "error":
        raise IndivisibleError(f"{reason}.\n{way_out}")
    warnings.warn(f"{reason}; every rank does it whole", stacklevel=2)
