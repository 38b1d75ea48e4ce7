"""The blocks of a model as graphs: what a block computes in forward, with its collectives and their bytes.

Blocks that compute the same are one, with the names of all. A parameter is a word of the call that uses it, so that the
graph shows how values flow.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of
from autopar.ir.node import origin, value, values
from autopar.ir.operator_facts import CASTS, is_view
from autopar.ir.program import AnyProgram
from autopar.ir.tables import InputKind
from autopar.ir.text import operator_name, type_text
from autopar.ir.traffic import bytes_of, moved_bytes
from autopar.report.document import Block, Call
from autopar.report.reasons import why

MOST_BLOCKS, MOST_CALLS = 12, 300
OUTSIDE = "(outside)"
WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)


def blocks_of(program: AnyProgram) -> tuple[Block, ...]:
    """The different blocks, those with most copies first; at most :data:`MOST_BLOCKS`."""
    reader = _Reader(program)
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in reader.quiet:
            found.setdefault(block_of(node), []).append(node)
    alike: dict[Hashable, list[str]] = {}
    for name, nodes in found.items():
        alike.setdefault(reader.likeness(nodes), []).append(name)
    ordered = sorted(alike.values(), key=lambda names: (-len(names), -len(found[names[0]])))
    return tuple(reader.block(names, found[names[0]]) for names in ordered[:MOST_BLOCKS])


class _Reader:
    """``weights``: nodes that carry parameters, buffers and constants as they are -> what they carry, in words.
    ``quiet``: those of them that are no calls of their own: all but gathers."""

    def __init__(self, program: AnyProgram) -> None:
        self.program, self.mesh = program, program.mesh
        self.weights: dict[fx.Node, tuple[str, ...]] = {
            node: (entry.target,) for node, entry in program.placeholders(*WEIGHTS)
        }
        self.quiet: set[fx.Node] = set(self.weights)
        for node in program.graph.nodes:
            sources = node.all_input_nodes
            if len(sources) != 1 or sources[0] not in self.weights or node.op != "call_function":
                continue
            carried = self.weights[sources[0]]
            if node.target in comm.IDENTITIES:
                carried = tuple(self._entered(node, text) for text in carried)
            elif not (node.target in CASTS or node.target in comm.GATHERS or is_view(node.target)):
                continue
            self.weights[node] = carried
            if node.target not in comm.GATHERS:
                self.quiet.add(node)

    def _entered(self, node: fx.Node, text: str) -> str:
        """What carries a weight that enters an axis: its gradient is a sum over that axis."""
        axis, dual = comm.arguments_of(node)["axis"], comm.COLLECTIVES[comm.TARGETS[node.target]].dual
        return text if comm.is_idle(node, self.mesh) else f"{text}, its gradient by {dual} over {axis}"

    def likeness(self, nodes: Sequence[fx.Node]) -> Hashable:
        """What blocks that compute the same have alike."""
        position = {node: number for number, node in enumerate(nodes)}
        return tuple(
            (
                operator_name(node.target),
                tuple(type_text(one) for one in values(node)),
                tuple(position.get(source, -1) for source in node.all_input_nodes),
            )
            for node in nodes
        )

    def block(self, names: Sequence[str], nodes: Sequence[fx.Node]) -> Block:
        shown = list(nodes[:MOST_CALLS])
        inside = set(shown)
        entering = [
            source
            for source in dict.fromkeys(source for node in shown for source in node.all_input_nodes)
            if source not in inside and source not in self.quiet
        ]
        leaving = [node for node in shown if any(user not in inside for user in node.users)]
        calls = [self.border(node, "input") for node in entering] + [self.call(node) for node in shown]
        position = {node: number for number, node in enumerate([*entering, *shown])}
        edges = [(position[source], position[node]) for node in shown for source in node.all_input_nodes
                 if source in position]  # fmt: skip
        for node in leaving:
            edges.append((position[node], len(calls)))
            calls.append(self.border(node, "output"))
        return Block(names[0], tuple(names), tuple(calls), tuple(dict.fromkeys(edges)), len(nodes) - len(shown))

    def border(self, node: fx.Node, kind: str) -> Call:
        where = origin(node)
        outside = [user for user in node.users if user.op == "output" or block_of(user) != block_of(node)]
        module = where.module if kind == "input" else ", ".join(
            dict.fromkeys("result" if user.op == "output" else origin(user).module or OUTSIDE for user in outside)
        )  # fmt: skip
        return Call(
            node.name, "from outside" if kind == "input" else "to outside", kind, module, "", _types(node),
            (), "", 0, "", 0, (),
        )  # fmt: skip

    def call(self, node: fx.Node) -> Call:
        name = comm.TARGETS.get(node.target)
        used = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in self.weights.get(source, ())))
        kind = "view" if is_view(node.target) or node.target is operator.getitem else "operator"
        axis, sent, backward, returned = "", 0, "", 0
        if name in comm.COLLECTIVES:
            axis = str(comm.arguments_of(node)["axis"])
            sent = self.sent(node, name, bytes_of(value(node.all_input_nodes[0]), self.mesh))
            backward = comm.COLLECTIVES[name].dual
            returned = self.sent(node, backward, bytes_of(value(node), self.mesh)) if value(node).requires_grad else 0
            kind = "collective" if sent else "entrance" if returned else "view"
        return Call(
            node.name, operator_name(node.target), kind, origin(node).module, origin(node).source, _types(node),
            used, axis, sent, backward if returned else "", returned,
            why(self.program, node.name),
        )  # fmt: skip

    def sent(self, node: fx.Node, name: str, size: int) -> int:
        """Bytes that a rank sends in the collective ``name``, on the axis of ``node``, of an operand of ``size``."""
        if comm.is_idle(node, self.mesh):
            return 0
        return moved_bytes(name, self.mesh.size(str(comm.arguments_of(node)["axis"])), size)


def _types(node: fx.Node) -> str:
    return ", ".join(type_text(one) for one in values(node))
