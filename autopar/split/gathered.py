"""What an axis runs whole although its operands are split: the calls, and what is gathered for them.

Nothing is wrong then, but each rank does the work of all and holds the whole: the user is told where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import fx

from autopar.ir.layout import Placement, Split, Whole
from autopar.ir.node import origin, values
from autopar.ir.tables import Decision
from autopar.notes import warn
from autopar.split.choose import Choice
from autopar.split.flow import Flow, Key, key_of

MOST_MODULES = 6  # in one warning


def gathered_for(flow: Flow, choice: Choice) -> dict[fx.Node, int]:
    """The calls that run whole -> the bytes of the activations gathered for each; what several use counts once.

    What the model returns is gathered in any case.
    """
    found: dict[fx.Node, int] = {}
    counted: set[Key] = set()
    returned = {key_of(node)[0] for node in flow.program.returned}
    for call, strategy in choice.strategies.items():
        if strategy.part is not None or (call in returned and not flow.uses.get((call, 0))):
            continue
        for operand, required in zip(flow.calls[call].operands, strategy.inputs):
            key = key_of(operand)
            kind = values(operand)[0]
            if key in counted or not kind.requires_grad or not isinstance(required, Whole):
                continue
            if isinstance(_produced(choice, key), Split):
                counted.add(key)
                size = math.prod(kind.layout.local_shape(flow.program.mesh)) * kind.dtype.itemsize
                found[call] = found.get(call, 0) + size
    return found


def _produced(choice: Choice, key: Key) -> Placement:
    node, index = key
    return choice.strategies[node].outputs[index] if node in choice.strategies else choice.placeholders[node]


def decisions_of_gathered(flow: Flow, choice: Choice) -> Mapping[str, Decision]:
    """For ``explain``: what is gathered for each call that runs whole."""
    found = {}
    for call, size in gathered_for(flow, choice).items():
        known = choice.decisions.get(call.name)
        text = f"whole on every rank, of {size:,} bytes that are gathered"
        found[call.name] = Decision(text, known.alternatives if known else {})
    return found


def warn_of_gathered(flow: Flow, choice: Choice) -> None:
    """Say which modules run something whole."""
    modules: dict[str, list[tuple[fx.Node, int]]] = {}
    for call, size in gathered_for(flow, choice).items():
        modules.setdefault(origin(call).module or "(top level)", []).append((call, size))
    if not modules:
        return
    total = sum(size for calls in modules.values() for _, size in calls)
    lines = [
        f"{flow.axis}={flow.ways}: some of what this model does along its sequence runs whole on every rank, "
        f"of {total:,} bytes that are gathered in each forward pass"
    ]
    for module, calls in list(modules.items())[:MOST_MODULES]:
        names = ", ".join(call.name for call, _ in calls[:3]) + (", ..." if len(calls) > 3 else "")
        lines.append(f"  {module}: {sum(size for _, size in calls):,} bytes for {names}")
    if len(modules) > MOST_MODULES:
        lines.append(f"  and {len(modules) - MOST_MODULES} modules more")
    warn("\n".join(lines), stacklevel=2)
