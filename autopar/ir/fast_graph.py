"""Nodes, copies and operators of graphs, in a third of torch's time: a compile copies its graphs about thirty times.

``fx.Graph.create_node`` looks for symbolic numbers in all arguments, and our graphs have none; for a name too, which is
known in a copy. An operator hashes slowly, so that to look up those of all nodes takes longer than what is asked of
them. This is the one file that needs ``Graph._insert`` and the tables of names and operators of a graph.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from autopar.ir.node import copy_meta


def created(graph: fx.Graph, op: str, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
    """``graph.create_node(op, target, args, kwargs, name)``, for arguments without symbolic numbers."""
    new: Any = graph
    names = new._graph_namespace
    name = names.create_name(name, None)
    made = fx.Node(new, name, op, target, args, kwargs)
    names.associate_name_with_obj(name, made)
    new._insert(made)
    new._find_nodes_lookup_table.insert(made)
    new._len += 1
    return made


def copied_node(graph: fx.Graph, node: fx.Node, instead: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """``graph.node_copy(node, instead)``: with all that is known of ``node``, on what stands for its operands."""
    args, kwargs = map_arg((node.args, node.kwargs), instead)
    made = created(graph, node.op, node.target, args, kwargs, node.name)
    copy_meta(made, node)
    return made


def copied(graph: fx.Graph) -> fx.Graph:
    """``graph`` once more: the same names, arguments and metadata (not copied deeply), other nodes."""
    new: Any = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    operators = new._find_nodes_lookup_table.table
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        made = fx.Node(new, node.name, node.op, node.target, args, kwargs, node.type)
        copy_meta(made, node)
        new._insert(made)
        copies[node] = made
    for key, known in graph._find_nodes_lookup_table.table.items():  # type: ignore[attr-defined]
        operators[key] = {copies[node]: None for node in known}
    new._len = len(copies)
    names, old = new._graph_namespace, graph._graph_namespace  # type: ignore[attr-defined]
    names._used_names, names._base_count = copy.copy(old._used_names), copy.copy(old._base_count)
    names._obj_to_name = {copies[node]: name for node, name in old._obj_to_name.items() if node in copies}
    return new  # type: ignore[no-any-return]


def sort_users(graph: fx.Graph) -> None:
    """Have the users of each node in the order of the graph, as a copy has them: passes take the first of them."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in places:
        if len(node.users) > 1:
            order = [places[user] for user in node.users]
            if any(map(operator.gt, order, order[1:])):
                users = sorted(node.users, key=places.__getitem__)
                node.users.clear()
                node.users.update(dict.fromkeys(users))


def called(graph: fx.Graph) -> list[Any]:
    """The operators that ``graph`` calls, each once."""
    table: Any = graph._find_nodes_lookup_table  # type: ignore[attr-defined]
    return [target for (op, target), nodes in table.table.items() if nodes and op == "call_function"]


def calls_of(graph: fx.Graph, targets: Iterable[Any]) -> list[fx.Node]:
    """The calls of these operators, in the order of the graph."""
    found = (graph.find_nodes(op="call_function", target=target, sort=False) for target in targets)
    return sorted(node for nodes in found for node in nodes)


def is_sound(graph: fx.Graph) -> bool:
    """What ``graph.lint()`` checks of a graph without modules: each node is known to it, is called as no other one, and
    takes earlier nodes of it."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if node.graph is not graph or not seen.issuperset(node._input_nodes):
            return False
        seen.add(node)
        names.add(node.name)
    table: Any = graph._find_nodes_lookup_table  # type: ignore[attr-defined]
    return len(names) == len(seen) and seen == set().union(*table.table.values())
