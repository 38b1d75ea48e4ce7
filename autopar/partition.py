"""Split a joint graph into forward and backward, so that little is kept in between.

    joint:     t = aten.t(w); y = aten.mm(x, t); ...; d_x = aten.mm(d_y, w)

What backward needs of forward is *saved*, except for what costs nothing to make again (views, tensors made out of
numbers) or is named by the caller (casts and gathers of parameters): that is made again in backward, just before use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.recorder import is_factory, is_view
from autopar.program import Node, origin, set_origin, set_values, values

aten = torch.ops.aten
CASTS = (aten._to_copy.default,)


@dataclass(frozen=True)
class Joint:
    """Forward and backward of one role as one graph. Placeholders: ``inputs``, then ``tangents`` (the gradients of
    the differentiable outputs). ``forward`` holds the nodes that ran before backward began."""

    graph: fx.Graph
    inputs: tuple[Node, ...]
    tangents: tuple[Node, ...]
    outputs: tuple[Node, ...]
    gradients: tuple[Node, ...]
    forward: frozenset[Node]


def is_free(node: Node) -> bool:
    """Whether ``node`` is made again in backward: views, numbers, casts of an input (the parameter is at hand)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_free(node.all_input_nodes[0])
    if node.target in CASTS:
        return all(source.op == "placeholder" for source in node.all_input_nodes)
    return is_view(node.target) or is_factory(node.target)


def partition(joint: Joint, remake: Callable[[Node], bool] = is_free) -> tuple[fx.Graph, fx.Graph, tuple[Node, ...]]:
    """Forward graph ``(inputs) -> (*outputs, *saved)``, backward graph ``(*saved, *tangents) -> gradients``, and the
    saved nodes of the joint graph. ``remake`` says which forward nodes backward makes again rather than gets."""
    backward = live_nodes(joint.gradients, stop=joint.forward)
    saved: dict[Node, None] = {}
    remade: set[Node] = set()
    wanted = [source for node in backward for source in node.all_input_nodes if source in joint.forward]
    wanted += [node for node in joint.gradients if node in joint.forward]
    while wanted:
        node = wanted.pop()
        if node in saved or node in remade:
            continue
        if node in joint.tangents:
            continue
        if remake(node):
            remade.add(node)
            wanted += node.all_input_nodes
        else:
            saved[node] = None
    order = {node: position for position, node in enumerate(joint.graph.nodes)}
    kept = tuple(sorted(saved, key=order.__getitem__))
    forward_graph = _extract(joint.inputs, (*joint.outputs, *kept), order)
    backward_graph = _extract((*kept, *joint.tangents), joint.gradients, order)
    return forward_graph, backward_graph, kept


def live_nodes(roots: Iterable[Node], stop: frozenset[Node] = frozenset()) -> set[Node]:
    """All nodes that ``roots`` are made of, without those in ``stop``."""
    found: set[Node] = set()
    wanted = list(roots)
    while wanted:
        node = wanted.pop()
        if node not in found and node not in stop:
            found.add(node)
            wanted += node.all_input_nodes
    return found


def _extract(sources: Sequence[Node], results: Sequence[Node], order: dict[Node, int]) -> fx.Graph:
    """The part of a graph that makes ``results`` out of ``sources``, in the same order; free nodes come late."""
    graph, copies = fx.Graph(), dict[Node, Node]()
    for node in sources:
        copies[node] = graph.placeholder(node.name)
        _describe(copies[node], node)
    stop = frozenset(sources)
    for node in sorted(live_nodes(results, stop), key=order.__getitem__):
        if not is_free(node):
            _copy(node, graph, copies)
    for node in results:
        _copy(node, graph, copies)
    graph.output(tuple(copies[node] for node in results))
    return graph


def _copy(node: Node, graph: fx.Graph, copies: dict[Node, Node]) -> None:
    """Copy ``node`` and what it needs that is not there yet."""
    pending = [node]
    while pending:
        last = pending[-1]
        missing = [source for source in last.all_input_nodes if source not in copies]
        if last in copies or not missing:
            pending.pop()
            if last not in copies:
                copies[last] = graph.node_copy(last, copies.__getitem__)
                _describe(copies[last], last)
        else:
            pending += missing


def _describe(copy: Node, node: Node) -> None:
    set_values(copy, *values(node))
    set_origin(copy, origin(node))
