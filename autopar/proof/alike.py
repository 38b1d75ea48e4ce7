"""Whether a program of a large model is that of a small one with its blocks more often, on a larger mesh.

Compared are the split graphs, line by line: the operator, the axis of a collective, over which axes each dim of the
result is split, and which lines its operands are; not the sizes. Where the lines part, the large graph has to repeat
the lines just before.

    embedding  norm linear ... add    norm linear ... add   head                       the small one
    embedding  norm linear ... add    norm linear ... add   norm linear ... add  head  the large one: one more
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from autopar.compiler import place
from autopar.ir import collectives as comm
from autopar.ir.layout import Layout
from autopar.ir.node import Node, values
from autopar.ir.operator_facts import is_overload
from autopar.ir.program import AnyProgram, Program

LEAST = 6  # lines of a block
_NUMBER = re.compile(r"_?\d+")  # of a block, in the name of a parameter
CANONICAL = "pad_rows"  # the last pass before anything is split


@dataclass(frozen=True)
class Likeness:
    """``repeats``: how many times a block is in the large graph that is not in the small one.

    ``difference``: the first line of the large graph that is neither in the small one nor a repetition; "" for none.
    ``pairs``: the nodes of the small graph, and which they are in the large one, up to there. Those of the last of
    several equal blocks are in the last one, as what follows them may be decided with it.
    """

    lines: int = 0
    repeats: int = 0
    difference: str = ""
    pairs: Mapping[str, str] = field(default_factory=dict)


def likeness(large: fx.Graph, small: fx.Graph) -> Likeness:
    """Compare two split graphs of one kind of model."""
    walk = _Walk(_calls(large), _calls(small))
    if walk.difference:
        return Likeness(len(walk.nodes), walk.repeats, walk.difference, walk.pairs)
    return Likeness(len(walk.nodes), walk.repeats, _otherwise_wired(walk.nodes, walk.stands), walk.pairs)


def aligned(large: fx.Graph, small: fx.Graph) -> dict[Node, Node]:
    """The node of the small graph that each of the large one is, or repeats; of those before the first difference."""
    walk = _Walk(_calls(large), _calls(small))
    found: dict[Node, Node] = {}
    for node, other in walk.stands.items():  # what is repeated comes before what repeats it
        found[node] = found.get(other, other)
    return found


class _Walk:
    """Two graphs, line by line. ``stands``: a node of the large one -> that of the small one, or that it repeats."""

    def __init__(self, nodes: Sequence[Node], others: Sequence[Node]) -> None:
        self.nodes, self.difference, self.repeats = nodes, "", 0
        self.stands: dict[Node, Node] = {}
        self.pairs: dict[str, str] = {}
        full, kept = list(map(_line, nodes)), list(map(_line, others))
        here = there = 0
        while here < len(full):
            if there < len(kept) and full[here] == kept[there]:
                self.stands[nodes[here]] = others[there]
                self.pairs[others[there].name] = nodes[here].name
                here, there = here + 1, there + 1
                continue
            period = _period(full, here)
            if not period:
                self.difference = f"{nodes[here].name} = {full[here]}"
                return
            self.stands |= {nodes[at]: nodes[at - period] for at in range(here, here + period)}
            latest = zip(others[max(there - period, 0) : there], nodes[here + max(period - there, 0) : here + period])
            self.pairs |= {other.name: node.name for other, node in latest}
            here, self.repeats = here + period, self.repeats + 1
        if there < len(kept):
            self.difference = f"the end: the small one goes on with {kept[there]}"


def _otherwise_wired(nodes: Sequence[Node], stands: Mapping[Node, Node]) -> str:
    """The first line that is computed from other values than the one that it stands for; "" for none.

    What repeats a line takes what that takes, or as much later as it is itself.
    """
    places = {node: place for place, node in enumerate(nodes)}

    def root(node: Node) -> Node | str:
        if node.op == "placeholder":  # whose name stands in the line
            return ""
        while node in stands:
            node = stands[node]
        return node

    def follows(given: Node, other: Node, period: int) -> bool:
        if given in places and other in places:
            return places[given] - places[other] in (0, period)
        return root(given) == root(other)

    for node, other in stands.items():
        given, wanted = node.all_input_nodes, other.all_input_nodes
        if len(given) != len(wanted):  # of all blocks together
            alike = {*map(root, given)} == {*map(root, wanted)}
        elif other in stands:
            alike = all(follows(*pair, places[node] - places[other]) for pair in zip(given, wanted))
        else:
            alike = all(root(one) == root(two) for one, two in zip(given, wanted))
        if not alike:
            return f"{node.name}({', '.join(map(str, given))}), other values than {other.name} takes"
    return ""


def decided_alike(large: AnyProgram, small: Program) -> Program:
    """What the program of a traced model, ``small`` on its mesh, has to be like: the decisions of ``large``.

    They are for nodes of the canonical form, which has more of them than the trace.
    """
    assert large.source is not None
    forms = [
        place(one, mesh, large.plan, after=CANONICAL) for one, mesh in ((large.source, large.mesh), (small, small.mesh))
    ]
    pairs = likeness(forms[0].graph, forms[1].graph).pairs
    decisions = {
        axis: {name: of[other] for name, other in pairs.items() if other in of} for axis, of in large.decisions.items()
    }
    return replace(small, decisions=decisions)


def _calls(graph: fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _period(lines: list[str], at: int) -> int:
    """The shortest block that ends before ``at`` and stands there again; 0 for none."""
    for period in range(LEAST, min(at, len(lines) - at) + 1):
        if lines[at] == lines[at - period] and lines[at : at + period] == lines[at - period : at]:
            return period
    return 0


def _line(node: Node) -> str:
    name = str(node.target) if is_overload(node.target) else getattr(node.target, "__name__", str(node.target))
    axis = f" over {comm.arguments_of(node)['axis']}" if node.target in comm.TARGETS else ""
    given = " ".join(_NUMBER.sub("", source.name) for source in node.all_input_nodes if source.op == "placeholder")
    return f"{name}{axis} {given} : {', '.join(_places(kind.layout) for kind in values(node))}"


def _places(layout: Layout) -> str:
    dims = ["+".join(axis for factor in dim for axis in factor.axes) or "-" for dim in layout.dims]
    pending = "".join(f"{{{op}:{axis}}}" for axis, op in layout.partial)
    return f"[{','.join(dims)}]{pending}"
