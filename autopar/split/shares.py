"""How much of a program an axis splits: never nothing, and not less than nine tenths of what it is there for.

An axis that splits nothing gives right numbers, each rank doing the work of all. So it is an error, the same for every
axis, which names the call that blocked it.
"""

from __future__ import annotations

from torch import fx

from autopar.errors import NothingSplitError
from autopar.ir.node import origin
from autopar.operators import ATTENTIONS
from autopar.split.choose import Choice, work_of
from autopar.split.flow import Flow

LEAST = 0.9  # of the work


def refuse_idle_axis(flow: Flow, choice: Choice) -> None:
    """Refuse a choice in which the axis splits no contraction, or less than nine tenths of the attention.

    Raises NothingSplitError.
    """
    work = {call: work_of(flow.factorings[call], flow.calls[call]) for call in flow.calls if _counts(flow, call)}
    attention = {call: seconds for call, seconds in work.items() if call.target in ATTENTIONS}
    for what, counted, least in (("attention", attention, LEAST), ("computation", work, 0.0)):
        total = sum(counted.values())
        done = sum(seconds for call, seconds in counted.items() if choice.strategies[call].part)
        if total and (done < least * total or not done):
            first = next(call for call in counted if not choice.strategies[call].part)
            raise NothingSplitError(_message(flow, first, what, done / total))


def _counts(flow: Flow, call: fx.Node) -> bool:
    return flow.factorings[call].contraction and not all(x in flow.weights for x in flow.calls[call].operands)


def _message(flow: Flow, call: fx.Node, what: str, share: float) -> str:
    where = origin(call)
    shapes = " ".join(str(list(shape)) for shape in flow.calls[call].inputs)
    lines = [
        f"{flow.axis}={flow.ways} splits {share:.0%} of the {what} of this model: every rank would do the rest whole",
        f"  first   {call.name} = {getattr(call.target, '__name__', call.target)} of {shapes}",
    ]
    lines += [f"  module  {where.module}"] if where.module else []
    lines += [f"  source  {where.source}"] if where.source else []
    lines += [f"Way out: sizes that {flow.axis}={flow.ways} divides, or a mesh without {flow.axis}."]
    return "\n".join(lines)
