"""How much of a program an axis splits: never nothing, and not less than nine tenths of what it is there for.

An axis that splits nothing gives right numbers, each rank doing the work of all. So it is an error, the same for every
axis, which names the call that blocked it.
"""

from __future__ import annotations

from torch import fx

from autopar.errors import NothingSplitError
from autopar.ir.node import origin
from autopar.ir.tables import InputKind
from autopar.operators import ATTENTIONS
from autopar.split.choose import Choice, work_of
from autopar.split.flow import Flow

LEAST = 0.9  # of the work


def refuse_idle_axis(flow: Flow, choice: Choice, least: float = LEAST, of_attention: float = LEAST) -> None:
    """Refuse a choice in which the axis splits too little.

    ``least``, ``of_attention``: the shares of all computation, and of attention, that it must split; 0: anything at
    all, and no attention. What depends on no input does not count.
    Raises NothingSplitError.
    """
    work = {call: work_of(flow.factorings[call], flow.calls[call]) for call in _counted(flow)}
    attention = {call: seconds for call, seconds in work.items() if call.target in ATTENTIONS}
    for what, counted, share in (("attention", attention, of_attention), ("computation", work, least)):
        total = sum(counted.values())
        done = sum(seconds for call, seconds in counted.items() if choice.strategies[call].part)
        if counted and (done < share * total or (not done and what == "computation")):
            whole = [call for call in counted if not choice.strategies[call].part]
            raise NothingSplitError(_message(flow, max(whole, key=counted.__getitem__), what, done / total))


def _counted(flow: Flow) -> list[fx.Node]:
    """The calls that depend on an input, in order."""
    inputs = {node for node, _ in flow.program.placeholders(InputKind.INPUT, InputKind.RECEIVED)}
    known = set(inputs)
    found = []
    for node in flow.program.graph.nodes:
        if known.intersection(node.all_input_nodes):
            known.add(node)
            if node in flow.calls:
                found.append(node)
    return found


def _message(flow: Flow, call: fx.Node, what: str, share: float) -> str:
    where = origin(call)
    shapes = " ".join(str(list(shape)) for shape in flow.calls[call].inputs)
    lines = [
        f"{flow.axis}={flow.ways} splits {share:.0%} of the {what} of this model: every rank would do the rest whole, "
        f"most of it at {where.module or call.name}",
        f"  largest {call.name} = {getattr(call.target, '__name__', call.target)} of {shapes}",
    ]
    lines += [f"  module  {where.module}"] if where.module else []
    lines += [f"  source  {where.source}"] if where.source else []
    lines += [f"Way out: sizes that {flow.axis}={flow.ways} divides, or a mesh without {flow.axis}."]
    return "\n".join(lines)
