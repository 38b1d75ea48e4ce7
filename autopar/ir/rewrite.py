"""Changes of a graph in place: replacing nodes, removing unused ones, adding constants (operators: ``builder``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from autopar.ir.layout import Layout
from autopar.ir.node import Origin, Value, set_origin, set_values
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """The argument at ``position``, which must be a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node), node.format_node()
    return found


def substitute(node: fx.Node, new: fx.Node) -> None:
    """Let every user of ``node`` use ``new`` instead, and remove ``node``."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def remove_unused(graph: fx.Graph) -> None:
    """Remove operators that nothing uses, random ones too (placeholders stay: they are the signature)."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def add_constants(program: Program, new: Mapping[str, tuple[Tensor, Origin]]) -> tuple[Program, dict[str, fx.Node]]:
    """``program``, whose graph a pass may write to, with further constants, and their placeholders by name."""
    graph, inputs = program.graph, list(program.inputs)
    following = (InputKind.INPUT, InputKind.SEED)
    first = next((node for node, _ in program.placeholders(*following)), None)
    first = first or next(node for node in graph.nodes if node.op != "placeholder")
    position = next((place for place, entry in enumerate(inputs) if entry.kind in following), len(inputs))
    nodes = {}
    for name, (tensor, where) in new.items():
        with graph.inserting_before(first):
            nodes[name] = graph.placeholder(f"c_{name}")
        set_values(nodes[name], Value(tensor.dtype, Layout.whole(tensor.shape)))
        set_origin(nodes[name], where)
        inputs.insert(position, Input(nodes[name].name, InputKind.CONSTANT, name))
        position += 1
    constants = {**program.constants, **{name: tensor for name, (tensor, _) in new.items()}}
    return replace(program, inputs=tuple(inputs), constants=constants), nodes


def drop_unused_constants(program: Program) -> Program:
    unused = [node for node, _ in program.placeholders(InputKind.CONSTANT) if not node.users]
    names = {node.name for node in unused}
    for node in unused:
        program.graph.erase_node(node)
    inputs = tuple(entry for entry in program.inputs if entry.node not in names)
    kept = {entry.target for entry in inputs}
    constants = {name: tensor for name, tensor in program.constants.items() if name in kept}
    return replace(program, inputs=inputs, constants=constants)
