"""Reachability in a graph: the nodes from which some nodes are computed, and the nodes computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from autopar.ir.node import Node


def ancestors(
    nodes: Iterable[Node], *, stop: Iterable[Node] = (), through: Callable[[Node], bool] = lambda node: True
) -> set[Node]:
    """``nodes`` and all that they are computed from, without the nodes in ``stop``.

    The walk continues from a node to its operands only where it may go ``through`` that node.
    """
    found: set[Node] = set()
    wanted, stop = list(nodes), frozenset(stop)
    while wanted:
        node = wanted.pop()
        if node not in found and node not in stop:
            found.add(node)
            wanted += node.all_input_nodes if through(node) else ()
    return found


def descendants(nodes: Iterable[Node]) -> set[Node]:
    """All nodes that are computed from one of ``nodes``, without these."""
    found: set[Node] = set()
    wanted = [user for node in nodes for user in node.users]
    while wanted:
        node = wanted.pop()
        if node not in found:
            found.add(node)
            wanted += node.users
    return found


def made_only_of(graph: fx.Graph, sources: Iterable[Node], *, factories: bool = False) -> set[Node]:
    """``sources`` and every call that takes nothing else; with ``factories`` also calls that take no tensor at all."""
    found = set(sources)
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and (sources or factories) and found.issuperset(sources):
            found.add(node)
    return found
