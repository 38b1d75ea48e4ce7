"""A split program of three blocks with the one in the middle repeated: that of the deep model, without tracing it.

    h1 = block.1(h0)                  h1 = block.1(h0); h2 = block.1(h1); h3 = block.1(h2)
    h2 = block.2(h1)       -->        h4 = block.2(h3)

What block 1 takes of block 0 its copy takes of the block before it: that is told by what block 2 takes of block 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from autopar.ir.node import Node, origin, set_origin, set_values, values
from autopar.ir.program import Program
from autopar.ir.tables import Input

BLOCKS = 3  # of a program that can be deepened
FIRST, MIDDLE, LAST = range(BLOCKS)


@dataclass(frozen=True)
class Deep:
    """``program``, with the calls of each of its blocks and, last, of the rest, in the order of the program."""

    program: Program
    calls: tuple[tuple[Node, ...], ...]


class NotAlike(Exception):
    """Blocks that differ in more than their number, or are used from elsewhere."""


def repeated(program: Program, name: str, blocks: int) -> Deep:
    """``program`` of three blocks in the list ``name`` with ``blocks`` of them, at least three; nothing is traced.

    Its decisions are left out. Raises NotAlike where the third block is not the second once more.
    """
    return _Writer(program, name, blocks).deep()


class _Writer:
    def __init__(self, program: Program, name: str, blocks: int) -> None:
        self.program, self.name, self.blocks = program, name, blocks
        self.entries = {entry.node: entry for entry in program.inputs}
        self.block_of: dict[Node, int] = {}
        self.own: tuple[list[Node], ...] = ([], [], [])
        self.early: set[Node] = set()  # of a block, but computed from parameters alone
        for node in program.graph.nodes:
            found = self._block(node)
            if found is not None:
                self.block_of[node] = found
                self.own[found].append(node)
                if node.op == "call_function" and self._of_own_parameters(node):
                    self.early.add(node)
        self.before = self._before()
        self.graph = fx.Graph()
        self.copies: list[dict[Node, Node]] = [{} for _ in range(blocks)]  # of the nodes of a block
        self.rest: dict[Node, Node] = {}
        self.inputs: list[Input] = []

    def deep(self) -> Deep:
        waiting = [node for node in self.own[MIDDLE] if node not in self.early and node.op != "placeholder"]
        for node in self.program.graph.nodes:
            block = self.block_of.get(node)
            if node.op == "placeholder" or node in self.early:
                for number in self._numbers(block):
                    self._copy(node, number)
            elif block == MIDDLE:
                self._copy(node, MIDDLE)
                waiting.remove(node)
            elif block == LAST:
                self._copy_middle(waiting)
                self._copy(node, self.blocks - 1)
            elif node.op != "output":
                self._copy(node, block)
        self._copy_middle(waiting)
        self.graph.output(tuple(self.rest.get(node) or self._last(node) for node in self.program.returned))
        program = replace(
            self.program, graph=self.graph, inputs=tuple(self.inputs), decisions={}, source=None, in_spec=None,
            out_spec=None,
        )  # fmt: skip
        groups = [*self.copies, self.rest]
        return Deep(program, tuple(tuple(n for n in group.values() if n.op == "call_function") for group in groups))

    def _numbers(self, block: int | None) -> Sequence[int | None]:
        if block is None or block == FIRST:
            return (block,)
        return (self.blocks - 1,) if block == LAST else range(1, self.blocks - 1)

    def _copy_middle(self, waiting: Sequence[Node]) -> None:
        """All copies of the second block; once."""
        if waiting:
            raise NotAlike(f"{self.name}.{LAST} begins before {self.name}.{MIDDLE} ends")
        for number in range(2, self.blocks - 1):
            for node in self.own[MIDDLE]:
                if node not in self.copies[number]:
                    self._copy(node, number)

    def _copy(self, node: Node, number: int | None) -> None:
        made = self.graph.node_copy(node, lambda source: self._operand(source, number))
        set_values(made, *values(node))
        known = self.rest if number is None else self.copies[number]
        known[node] = made
        if number is None:
            set_origin(made, origin(node))
        else:
            set_origin(made, replace(origin(node), module=self._renamed(origin(node).module, node, number)))
        if node.op == "placeholder":
            self.inputs.append(self._input(self.entries[node.name], made, node, number))

    def _input(self, entry: Input, made: Node, node: Node, number: int | None) -> Input:
        if number is None:
            return replace(entry, node=made.name)
        names = [self._renamed(name, node, number) for name in entry.names]
        return replace(entry, node=made.name, target=names[0], aliases=tuple(names[1:]))

    def _renamed(self, path: str, node: Node, number: int) -> str:
        before, after = f"{self.name}.{self.block_of[node]}", f"{self.name}.{number}"
        return after + path.removeprefix(before) if f"{path}.".startswith(f"{before}.") else path

    def _operand(self, source: Node, number: int | None) -> Node:
        block = self.block_of.get(source)
        if block is None:
            return self.rest[source]
        if number is None:
            return self._last(source)
        if source in self.copies[number]:
            return self.copies[number][source]
        if number in (FIRST, 1):
            return self.copies[block][source]
        if number == self.blocks - 1:  # what the third block takes of the second
            return self.copies[number - 1][source]
        return self.copies[number - 1][self.before[source]]

    def _last(self, source: Node) -> Node:
        if self.block_of.get(source) != LAST:
            raise NotAlike(f"{source.name} of {self.name} is used behind all blocks")
        return self.copies[self.blocks - 1][source]

    def _block(self, node: Node) -> int | None:
        """By the module, the name of a parameter, or what a call takes where it computes from parameters alone."""
        entry = self.entries.get(node.name) if node.op == "placeholder" else None
        path = f"{origin(node).module if entry is None else entry.target}."
        for number in range(BLOCKS):
            if path.startswith(f"{self.name}.{number}."):
                return number
        sources = {self.block_of.get(source) for source in node.all_input_nodes}
        if node.op == "call_function" and len(sources) == 1 and self._of_own_parameters(node):
            return sources.pop()
        return None

    def _of_own_parameters(self, node: Node) -> bool:
        """Whether it is computed from parameters of blocks alone."""
        return all(
            source in self.early or (source.op == "placeholder" and source in self.block_of)
            for source in node.all_input_nodes
        ) and bool(node.all_input_nodes)

    def _before(self) -> Mapping[Node, Node]:
        """Value of the first block that the second takes -> that of the second which the third takes in its place."""
        place = [{node: position for position, node in enumerate(nodes)} for nodes in self.own]
        found: dict[Node, Node] = {}
        if len(self.own[MIDDLE]) != len(self.own[LAST]) or not self.own[MIDDLE]:
            raise NotAlike(f"{self.name}.{MIDDLE} and {self.name}.{LAST} have other calls")
        for one, other in zip(self.own[MIDDLE], self.own[LAST]):
            if one.op != other.op or (one.op == "call_function" and one.target != other.target):
                raise NotAlike(f"{one.name} and {other.name} are other calls")
            if [kind.layout for kind in values(one)] != [kind.layout for kind in values(other)]:
                raise NotAlike(f"{one.name} and {other.name} give other values")
            taken = [pytree.tree_leaves((node.args, dict(node.kwargs))) for node in (one, other)]
            if len(taken[0]) != len(taken[1]):
                raise NotAlike(f"{one.name} and {other.name} have other arguments")
            for mine, its in zip(*taken):
                self._compare(mine, its, place, found)
        return found

    def _compare(self, one: Any, other: Any, place: Sequence[Mapping[Node, int]], found: dict[Node, Node]) -> None:
        """An argument in the second and in the third block."""
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            alike = type(one) is type(other) and one == other
        else:
            blocks = self.block_of.get(one), self.block_of.get(other)
            alike = one is other if blocks == (None, None) else blocks in ((FIRST, MIDDLE), (MIDDLE, LAST))
            if blocks == (FIRST, MIDDLE):
                alike = found.setdefault(one, other) is other
            elif blocks == (MIDDLE, LAST):
                alike = place[MIDDLE][one] == place[LAST][other]
        if not alike:
            raise NotAlike(f"{self.name}.{MIDDLE} takes {one}, {self.name}.{LAST} takes {other}")
