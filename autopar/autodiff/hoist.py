"""The work that a step does once for all its batches: gathering parameters before, reducing gradients after.

    forward  (p: f32[8@dp,4], x) : g = comm.all_gather(p, dp); y = linear(x, g)
    -->
    gathering(p) : g = comm.all_gather(p, dp)        forward (p, x, g) : y = linear(x, g)

    backward (x, d) : w = mm(t(d), x); r = comm.reduce_scatter(w, dp); return r
    -->
    backward (x, d) : w = mm(t(d), x); return w      reducing (w) : r = comm.reduce_scatter(w, dp); return r

The first is for ``Plan(zero=1)`` and ``2``, where whole parameters stay in memory (Rajbhandari et al. 2020, section
5.1); the second for gradient accumulation without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from torch import fx

from autopar.autodiff.partition import extract
from autopar.ir import collectives as comm
from autopar.ir.layout import Split
from autopar.ir.node import Node, output_node
from autopar.ir.operator_facts import is_view
from autopar.ir.reach import ancestors

aten = torch.ops.aten
CAST = aten._to_copy.default
WAIT = comm.OPS.wait.default
GATHERING = comm.started_too(comm.GATHERS)
ARRANGING = (aten.cat.default, CAST, aten.constant_pad_nd.default, WAIT)  # beside views
REDUCING = comm.started_too(comm.REDUCTIONS)


@dataclass(frozen=True)
class Gathers:
    """``graph``: (parameters called ``parameters``) -> whole ones.

    ``owners``: for each whole one, the parameter from which it is made by stacking the parts of an axis, and that axis;
    None for those made in another way.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    owners: tuple[tuple[str, str] | None, ...]


@dataclass(frozen=True)
class Gathering(Gathers):
    """``rest``: (*inputs of before, *whole ones) -> as before."""

    rest: fx.Graph


def without_gathers(graph: fx.Graph, parameters: Set[str]) -> Gathering | None:
    """``graph`` with the parameters that it gathers as whole inputs; None where it gathers none."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    made = {node: frozenset({node.name}) for node in inputs if node.name in parameters}
    gathered: set[Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        arranges = node.target in (*GATHERING, *ARRANGING) or (node.op == "call_function" and is_view(node.target))
        if arranges and sources and all(source in made for source in sources):
            made[node] = frozenset().union(*(made[source] for source in sources))
            if node.target in GATHERING or any(source in gathered for source in sources):
                gathered.add(node)
    whole = [node for node in graph.nodes if node in gathered and _leaves(node, gathered)]
    if not whole:
        return None
    used = frozenset[str]().union(*(made[node] for node in whole))
    sources = [node for node in inputs if node.name in used]
    returned = output_node(graph).args[0]
    assert isinstance(returned, (tuple, list))
    owners = tuple(_owner(node) for node in whole)
    rest = extract(graph, [*inputs, *whole], returned)  # type: ignore[arg-type]
    return Gathering(extract(graph, sources, whole), tuple(node.name for node in sources), owners, rest)


def _owner(node: Node) -> tuple[str, str] | None:
    if node.target is WAIT:
        (node,) = node.all_input_nodes
    if node.target not in GATHERING or comm.split_of(node.args[1:]) != Split(0):
        return None
    source, axis = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(axis, str)
    return (source.name, axis) if source.op == "placeholder" else None


def _leaves(node: Node, gathered: Set[Node]) -> bool:
    return any(user not in gathered for user in node.users)


@dataclass(frozen=True)
class Reducing:
    """``rest``: the backward graph up to the sums over ``axes`` for which only gradients wait.

    ``graph``: (results of ``rest``) -> gradients. Gradients that are required at once are the first results of
    ``rest``, and ``graph`` does not take them.
    """

    rest: fx.Graph
    graph: fx.Graph


def without_reductions(graph: fx.Graph, axes: Iterable[str], at_once: Set[int] = frozenset()) -> Reducing:
    """A backward graph cut before the reductions over ``axes`` of gradients that are only returned.

    What follows these reductions waits too, sums over other axes included: sums commute.
    ``at_once``: positions of gradients that cannot wait.
    """
    axes = frozenset(axes)
    ends = only_returned(graph)
    last: set[Node] = set()  # everything from a reduction to the end
    for node in graph.nodes:
        if node.op != "call_function" or node not in ends:
            continue
        follows = any(source in last for source in node.all_input_nodes)
        if follows or _reduces(node, axes) or (_arranges(node) and _reduced_later(node, ends, axes)):
            last.add(node)
    returned = output_node(graph).args[0]
    assert isinstance(returned, (tuple, list))
    now = [node for position, node in enumerate(returned) if position in at_once]
    later = [node for position, node in enumerate(returned) if position not in at_once]
    given = list(dict.fromkeys(_taken(later, last)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return Reducing(extract(graph, inputs, [*now, *given]), extract(graph, given, later))  # type: ignore[list-item, arg-type]


def only_returned(graph: fx.Graph) -> set[Node]:
    """The nodes that add up gradients over ranks, or arrange them, for nothing but to return them; and the output."""
    ends = {output_node(graph)}
    for node in reversed(list(graph.nodes)):
        moves = _arranges(node) or node.target in REDUCING or node.target is WAIT
        if node.op == "call_function" and node.users and moves and all(user in ends for user in node.users):
            ends.add(node)
    return ends


def _arranges(node: Node) -> bool:
    return node.op == "call_function" and (is_view(node.target) or node.target in ARRANGING) and node.target is not WAIT


def _reduces(node: Node, axes: Set[str]) -> bool:
    return node.target in REDUCING and comm.axes_over(node) <= axes


def _reduced_later(node: Node, ends: Set[Node], axes: Set[str]) -> bool:
    """Whether ``node`` only rearranges the operand of a later reduction over ``axes``.

    A cast does more: it sets the dtype of the sum. A sum over other axes before it stays where it is, with its wait.
    """
    queue = list(node.users) if node.target is not CAST else []
    while queue:
        user = queue.pop()
        if user.op == "call_function" and user in ends and user.target is not CAST:
            if _reduces(user, axes):
                return True
            if _arranges(user):
                queue += user.users
    return False


def _taken(returned: Iterable[object], last: Set[Node]) -> list[Node]:
    """The values before the cut that the reductions, and the gradients without one, take."""
    results = [node for node in returned if isinstance(node, fx.Node)]
    inside = ancestors([node for node in results if node in last])
    found = [source for node in inside if node in last for source in node.all_input_nodes if source not in last]
    order = {node: position for position, node in enumerate(results[0].graph.nodes)} if results else {}
    return sorted([*found, *(node for node in results if node not in last)], key=order.__getitem__)
