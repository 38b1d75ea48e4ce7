"""The joint graph of a deep program, from that of the program without most of its equal blocks.

    forward:  b0 b1          b2 b3            b0 b1 c1 c2 c3 b2 b3
    backward: B3 B2          B1 B0     -->    B3 B2 C3 C2 C1 B1 B0

Each copy takes of its neighbours what b1 and b2, which have to be the same calls, take of theirs. The result is what
recording the deep program would have given, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar.autodiff.partition import Joint
from autopar.autodiff.recorder import Names
from autopar.autodiff.repeats import Repeat, Short
from autopar.ir.arguments import flat_arguments
from autopar.ir.fast_graph import created
from autopar.ir.node import Node, origin, set_origin, set_values, value, values
from autopar.ir.program import Program

FIRST, SECOND = 1, 2  # of the kept blocks: the copies of the first come between them


class NotAlike(Exception):
    """The blocks in the middle are not the same calls: the deep program has to be recorded itself."""


@dataclass(frozen=True)
class Place:
    """Where a node of the joint graph of the short program stands: in which block, in which half, as which node."""

    block: int
    is_forward: bool
    position: int


def deepened(
    joint: Joint, blocks: Mapping[Node, int], gradients: Sequence[str], short: Short, program: Program, repeat: Repeat
) -> tuple[Joint, tuple[str, ...]]:
    """The joint graph of ``program``, and the names of its gradients, ``gradients`` being those of ``joint``.

    ``blocks``: of the calls of ``joint``, the block of the short program from which they come. Raises NotAlike.
    """
    writer = _Writer(joint, blocks, short, program, repeat)
    return writer.written(dict(zip(gradients, joint.gradients)))


class _Writer:
    def __init__(
        self, joint: Joint, blocks: Mapping[Node, int], short: Short, program: Program, repeat: Repeat
    ) -> None:
        self.joint, self.short, self.program, self.repeat = joint, short, program, repeat
        self.place: dict[Node, Place] = {}
        self.halves: dict[tuple[int, bool], list[Node]] = {}
        for node in joint.graph.nodes:
            if node in blocks:
                half = self.halves.setdefault((blocks[node], node in joint.forward), [])
                self.place[node] = Place(blocks[node], node in joint.forward, len(half))
                half.append(node)
        taken = [node for node in short.program.graph.nodes if node.op == "placeholder"]
        self.input_of = {short.sources[node]: made for node, made in zip(taken, joint.inputs)}  # by the deep node
        self.own = {  # placeholders of the blocks in the middle
            self.input_of[node]: (block, position)
            for block in (FIRST, SECOND)
            for position, node in enumerate(repeat.own[repeat.kept[block]])
        }
        self.sources: dict[
            Node, dict[Any, Any]
        ] = {}  # of the first block's nodes: what they take -> what the second's do
        self.neighbours: dict[Node, Node] = {}  # what the first takes of one block -> what the second takes of the next
        self._compare()
        self._refuse_other_uses()
        self.graph = fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.made: dict[tuple[int, Place], Node] = {}  # by the deep block
        self.placeholders: dict[Node, Node] = {}  # by the deep node
        self.names = Names(node.name for node in program.graph.nodes)
        self.numbered = {node.name for node in short.sources}
        first = repeat.kept[FIRST]
        self.named = {node.name: position for position, node in enumerate(repeat.blocks[first])}

    # ------------------------------------------------------------ what has to hold

    def _compare(self) -> None:
        """Both blocks in the middle are the same calls, of the same places of their neighbours."""
        for is_forward in (True, False):
            one, other = (self.halves.get((block, is_forward), []) for block in (FIRST, SECOND))
            order = [node for node in self.joint.graph.nodes if node in self.place]
            between = (*one, *other) if is_forward else (*other, *one)
            start = order.index(between[0]) if between else 0
            if len(one) != len(other) or tuple(order[start : start + len(between)]) != between:
                raise NotAlike(f"{len(one)} and {len(other)} nodes, or not one after the other")
            for mine, its in zip(one, other):
                if mine.target is not its.target or values(mine) != values(its):
                    raise NotAlike(f"{mine.format_node()} and {its.format_node()}")
                (taken, shape), (others, other_shape) = flat_arguments(mine), flat_arguments(its)
                if shape != other_shape or not all(map(self._fits, taken, others)):
                    raise NotAlike(f"{mine.format_node()} and {its.format_node()}")
                self.sources[mine] = dict(zip(taken, others))

    def _fits(self, one: Any, other: Any) -> bool:
        if not isinstance(one, Node) or not isinstance(other, Node):
            return type(one) is type(other) and repr(one) == repr(other)
        if one in self.own or other in self.own:
            mine, its = self.own.get(one, (0, 0)), self.own.get(other, (0, 0))
            return (mine[0], its[0]) == (FIRST, SECOND) and mine[1] == its[1]
        places = self.place.get(one), self.place.get(other)
        if one is other:
            return places[0] is None or places[0].block not in (FIRST, SECOND)
        if places[0] is None or places[1] is None or places[0].is_forward != places[1].is_forward:
            return False
        if (places[0].block, places[1].block) == (FIRST, SECOND):
            return places[0].position == places[1].position
        return places[0].block + 1 == places[1].block and self.neighbours.setdefault(one, other) is other

    def _refuse_other_uses(self) -> None:
        """Nothing but themselves and their neighbours uses what the blocks in the middle compute."""
        for node in self.joint.graph.nodes:
            mine = self.place.get(node)
            for source in node.all_input_nodes:
                its = self.place.get(source)
                if its is None or its.block not in (FIRST, SECOND):
                    continue
                if mine is None or abs(mine.block - its.block) > 1:
                    raise NotAlike(f"{node.format_node()} uses {source.name}")
        if any(self.place.get(node, Place(0, True, 0)).block in (FIRST, SECOND) for node in self.joint.outputs):
            raise NotAlike("the program returns what a block in the middle computes")

    # ------------------------------------------------------------ writing

    def written(self, gradients: Mapping[str, Node]) -> tuple[Joint, tuple[str, ...]]:
        found = self._gradients(gradients)  # refuses before anything is written
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        last = {half[-1]: key for key, half in self.halves.items()}
        forward: set[Node] = set()
        for node in self.joint.graph.nodes:
            if node.op == "output" or node in self.joint.inputs:
                continue
            self._copy(node)
            if last.get(node) in ((FIRST, True), (SECOND, False)):
                self._copy_blocks(self.place[node].is_forward)
            if node in self.joint.forward:
                forward = set(self.graph.nodes)
        self.graph.output(())
        joint = Joint(
            self.graph,
            tuple(self.placeholders.values()),
            tuple(self.copies[node] for node in self.joint.tangents),
            tuple(self.copies[node] for node in self.joint.outputs),
            tuple(self._gradient(*where) for where in found.values()),
            frozenset(forward),
        )
        return joint, tuple(found)

    def _placeholder(self, node: Node) -> None:
        made = self.graph.placeholder(node.name)
        set_values(made, value(node))
        set_origin(made, origin(node))
        self.placeholders[node] = made
        if node in self.input_of:
            self.copies[self.input_of[node]] = made

    def _copy(self, node: Node) -> None:
        """A node of the short joint graph; those in the middle have new neighbours."""
        mine = self.place.get(node)

        def operand(source: Node) -> Node:
            its = self.place.get(source)
            if mine is not None and its is not None:
                if (mine.block, its.block) == (FIRST, SECOND):
                    return self.made[self.repeat.dropped[0], replace(its, block=FIRST)]
                if (mine.block, its.block) == (SECOND, FIRST):
                    return self.made[self.repeat.dropped[-1], its]
            return self.copies[source]

        name = node.name if node.op == "placeholder" or node.name in self.numbered else None
        self.copies[node] = self._node(node, name, operand)
        set_origin(self.copies[node], origin(node))

    def _copy_blocks(self, is_forward: bool) -> None:
        dropped = self.repeat.dropped
        for number in dropped if is_forward else reversed(dropped):
            for node in self.halves[FIRST, is_forward]:
                self._copy_into(number, node)

    def _copy_into(self, number: int, node: Node) -> None:
        """The node of the deep block ``number`` that stands where ``node`` does in the first one in the middle."""
        own, theirs = self.repeat.own[number], self.sources[node]

        def operand(source: Node) -> Node:  # as the first takes it
            if source in self.own:
                return self.placeholders[own[self.own[source][1]]]
            its = theirs[source]
            if source is its:
                return self.copies[source]
            mine, place = self.place[source], self.place[its]
            if place.block == SECOND:  # its own
                return self.made[number, mine]
            if place.block == FIRST:  # of the block before
                return self._in_block(number - 1, place)
            return self._in_block(number + 1, replace(mine, block=FIRST))

        position = self.named.get(node.name)
        name = None if position is None else self.repeat.blocks[number][position].name
        made = self._node(node, name, operand)
        set_origin(made, replace(origin(node), module=self._module(origin(node).module, number)))
        self.made[number, self.place[node]] = made

    def _module(self, path: str, number: int) -> str:
        """The path of a module in the deep block, from that in the first one in the middle."""
        for one, other in zip(self.repeat.numbers[self.repeat.kept[FIRST]], self.repeat.numbers[number]):
            before = f"{self.repeat.name}.{one}".lstrip(".")
            if f"{path}.".startswith(f"{before}."):
                return f"{self.repeat.name}.{other}".lstrip(".") + path.removeprefix(before)
        return path

    def _in_block(self, number: int, place: Place) -> Node:
        """The node of a deep block that stands where one of the first block in the middle does."""
        if number in self.repeat.dropped:
            return self.made[number, place]
        block = FIRST if number < self.repeat.dropped[0] else SECOND
        return self.copies[self.halves[block, place.is_forward][place.position]]

    def _node(self, node: Node, name: str | None, operand: Any) -> Node:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand)
        name = name or self.names.name(node.target)
        made = created(self.graph, node.op, node.target, args, kwargs, name)
        set_values(made, *values(node))
        return made

    # ------------------------------------------------------------ gradients

    def _gradients(self, known: Mapping[str, Node]) -> dict[str, tuple[int | None, Node]]:
        """For each leaf of the deep program that has a gradient: the dropped block in which it is, the node like it."""
        targets = {entry.node: entry.target for entry in self.program.inputs}
        owner = {
            node: (number, position)
            for number in (*self.repeat.dropped, self.repeat.kept[FIRST], self.repeat.kept[SECOND])
            for position, node in enumerate(self.repeat.own[number])
        }
        found: dict[str, tuple[int | None, Node]] = {}
        for node, entry in self.program.leaves():
            target = entry.target
            if node not in owner:
                if target in known:
                    found[target] = None, known[target]
                continue
            number, position = owner[node]
            nodes = [
                known.get(targets[self.repeat.own[self.repeat.kept[block]][position].name]) for block in (FIRST, SECOND)
            ]
            if nodes == [None, None]:
                continue
            if nodes[0] is None or nodes[1] is None or not self._fits(*nodes) or nodes[0] not in self.place:
                raise NotAlike(f"the gradient of {target}")
            if number in self.repeat.dropped:
                found[target] = number, nodes[0]
            else:
                found[target] = None, known[target]
        return found

    def _gradient(self, number: int | None, node: Node) -> Node:
        if number is None:
            return self.copies[node]
        return self.made[number, self.place[node]]
