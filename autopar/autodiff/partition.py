"""Split a joint graph into forward and backward, so that few bytes are kept in between.

    joint:     t = aten.t(w); y = aten.mm(x, t); ...; d_x = aten.mm(d_y, w)

Backward gets the forward values that it needs as *saved* values. It recomputes, just before their first use, those that
cost nothing (views, tensors made from numbers, casts of parameters) and those that the caller names (gathers of
parameters, recomputed activations).

The order is that of the joint graph, with three exceptions that are the same on all ranks: a reduction runs as soon as
its operand is available (its memory is freed, other work can hide it); free nodes and gathers run just before their
use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.fast_graph import copied_node
from autopar.ir.node import Node, origin, output_node, set_origin, set_values, values
from autopar.ir.operator_facts import is_free
from autopar.ir.reach import ancestors

aten = torch.ops.aten

Recompute = Callable[[Node], bool]


@dataclass(frozen=True)
class Joint:
    """Forward and backward of one role as one graph. Placeholders: ``inputs``, then ``tangents``.

    ``tangents`` are the gradients of the differentiable outputs. ``forward`` holds the nodes that ran before backward.
    """

    graph: fx.Graph
    inputs: tuple[Node, ...]
    tangents: tuple[Node, ...]
    outputs: tuple[Node, ...]
    gradients: tuple[Node, ...]
    forward: frozenset[Node]


def partition(joint: Joint, recompute: Recompute = is_free) -> tuple[fx.Graph, fx.Graph, tuple[Node, ...]]:
    """Forward graph ``(inputs) -> (*outputs, *saved)``, backward graph ``(*saved, *tangents) -> gradients``.

    The third result is the saved nodes of the joint graph. ``recompute``: whether backward recomputes a forward node.
    """
    saved = saved_nodes(joint, recompute)
    late: Recompute = lambda node: node in joint.forward or is_late(node)  # noqa: E731
    forward = extract(joint.graph, joint.inputs, (*joint.outputs, *saved))
    backward = extract(joint.graph, (*saved, *joint.tangents), joint.gradients, late)
    return forward, backward, saved


def joined(forward: fx.Graph, backward: fx.Graph, saved: int) -> Joint:
    """The inverse of :func:`partition`: a node that backward recomputes is the node of forward again.

    ``saved``: the number of values that forward returns after its outputs, and that backward takes before the tangents.
    """
    graph, copies = fx.Graph(), dict[Node, Node]()
    inputs = [_copied(node, graph, copies) for node in forward.nodes if node.op == "placeholder"]
    known = {_call(node, copies): _copied(node, graph, copies) for node in forward.nodes if node.op == "call_function"}
    inside = frozenset(graph.nodes)
    results = [copies[node] for node in _returned(forward)]
    split = len(results) - saved
    given = [node for node in backward.nodes if node.op == "placeholder"]
    copies |= zip(given, results[split:])
    tangents = [_copied(node, graph, copies) for node in given[saved:]]
    for node in backward.nodes:
        if node.op == "call_function":
            again = known.get(_call(node, copies)) if is_late(node) else None
            copies[node] = again or _copied(node, graph, copies)
    gradients = tuple(copies[node] for node in _returned(backward))
    graph.output(())
    return Joint(graph, tuple(inputs), tuple(tangents), tuple(results[:split]), gradients, inside)


def _returned(graph: fx.Graph) -> tuple[Node, ...]:
    found: tuple[Node, ...] = output_node(graph).args[0]  # type: ignore[assignment]
    return found


def _copied(node: Node, graph: fx.Graph, copies: dict[Node, Node]) -> Node:
    copies[node] = copied_node(graph, node, copies.__getitem__)
    return copies[node]


def _call(node: Node, copies: dict[Node, Node]) -> str:
    """The target and operands of ``node``: equal for equal calls."""
    return repr((node.target, *fx.map_arg((node.args, node.kwargs), copies.__getitem__)))


def saved_nodes(joint: Joint, recompute: Recompute) -> tuple[Node, ...]:
    """The forward nodes that must be kept, in the order of the graph."""
    backward = ancestors(joint.gradients, stop=joint.forward)
    wanted = [source for node in backward for source in node.all_input_nodes if source in joint.forward]
    wanted += [node for node in joint.gradients if node in joint.forward]
    again: Recompute = lambda node: node.op != "placeholder" and recompute(node)  # noqa: E731
    needed = ancestors(wanted, through=again)
    return tuple(node for node in joint.graph.nodes if node in needed and not again(node))


def is_late(node: Node) -> bool:
    return is_free(node) or node.target in comm.GATHERS


def extract(graph: fx.Graph, sources: Sequence[Node], results: Sequence[Node], late: Recompute = is_late) -> fx.Graph:
    """The part of ``graph`` that computes ``results`` from ``sources``; ``late`` nodes wait for their first use."""
    part = _Part()
    for node in sources:
        part.copies[node] = part.graph.placeholder(node.name)
        _describe(part.copies[node], node)
    live = ancestors(results, stop=sources)
    early: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node in live and node.target in comm.REDUCTIONS:
            early.setdefault(_anchor(node.all_input_nodes[0]), []).append(node)
    for node in graph.nodes:
        if node in live and not late(node):
            part.copy(node)
        if node in part.copies:
            for reduction in early.get(node, ()):
                part.copy(reduction)
    for node in results:
        part.copy(node)
    part.graph.output(tuple(part.copies[node] for node in results))
    return part.graph


def _anchor(node: Node) -> Node:
    """The node that ``node`` is a view of: once that is available, so is ``node``."""
    while is_free(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


class _Part:
    def __init__(self) -> None:
        self.graph, self.copies = fx.Graph(), dict[Node, Node]()

    def copy(self, node: Node) -> None:
        """Copy ``node`` and the operands that are not copied yet."""
        pending = [node]
        while pending:
            last = pending[-1]
            missing = [source for source in last.all_input_nodes if source not in self.copies]
            if last in self.copies or not missing:
                pending.pop()
                if last not in self.copies:
                    self.copies[last] = copied_node(self.graph, last, self.copies.__getitem__)
            else:
                pending += missing


def _describe(copy: Node, node: Node) -> None:
    set_values(copy, *values(node))
    set_origin(copy, origin(node))
