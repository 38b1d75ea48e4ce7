"""Blocks of a program that are the same calls, one after the other; and the program without most of them.

    h1 = block 0 (h0); h2 = block 1 (h1); ...; h80 = block 79 (h79)      h1 = block 0 (h0); h2 = block 1 (h1)
                                                                   -->   h79 = block 78 (h2); h80 = block 79 (h79)

What autograd makes of the short program tells what it makes of the deep one (:mod:`autopar.autodiff.deepen`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from autopar.ir.arguments import flat_arguments
from autopar.ir.fast_graph import copied_node
from autopar.ir.node import Node, origin, values
from autopar.ir.program import Program

KEPT = 4  # blocks of the short program: what surrounds the two in the middle may look otherwise
FEWEST = 3  # that are left out; for fewer it does not pay
PERIODS = range(1, 7)  # modules in a block: kinds that take turns (one layer in six with full attention)
_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Repeat:
    """A run of equal blocks. ``blocks``: the calls of each, position by position the same; ``own``: the placeholders
    (parameters, buffers) that a block alone uses, in the order in which its calls name them."""

    name: str  # of the list that holds the blocks, ``model.layers``
    numbers: tuple[tuple[str, ...], ...]  # in that list, of the modules in each block: several where kinds take turns
    blocks: tuple[tuple[Node, ...], ...]
    own: tuple[tuple[Node, ...], ...]

    @cached_property
    def dropped(self) -> range:
        """The blocks that the short program leaves out, by their places."""
        return range(KEPT // 2, len(self.blocks) - KEPT // 2)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        return (*range(self.dropped.start), *range(self.dropped.stop, len(self.blocks)))


@dataclass(frozen=True)
class Short:
    """``program`` without the dropped blocks; ``block``: of its calls, the place in ``Repeat.kept``; ``sources``: of
    its nodes, those of the deep program."""

    program: Program
    block: Mapping[Node, int]
    sources: Mapping[Node, Node]


def repeat_of(program: Program) -> Repeat | None:
    """The longest run of equal blocks; None if there is none that is worth it."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found: list[Repeat] = []
    for name, members in _lists(calls).items():
        for period in PERIODS:
            starts = list(members.values())[::period]
            if len(starts) < KEPT + FEWEST + 1:
                break
            numbers = [tuple(members)[place : place + period] for place in range(0, len(members), period)]
            blocks = [tuple(calls[start:end]) for start, end in zip(starts, starts[1:])]  # the last one ends somewhere
            repeat = _longest(name, numbers, blocks, set(program.returned))
            if repeat is not None:
                found.append(repeat)
                break
    return max(found, key=lambda repeat: sum(map(len, repeat.blocks)), default=None)


def _lists(calls: Sequence[Node]) -> dict[str, dict[str, int]]:
    """For each list of modules, outermost ones, where the calls of each of its members begin, by its number."""
    seen: dict[str, dict[str, int]] = {}
    for position, node in enumerate(calls):
        found = _NUMBERED.search(origin(node).module)
        if found is not None:
            name = origin(node).module[: found.start(1)].rstrip(".")
            seen.setdefault(name, {}).setdefault(found[1], position)
    return seen


def _longest(
    name: str, numbers: Sequence[tuple[str, ...]], blocks: Sequence[tuple[Node, ...]], returned: Set[Node]
) -> Repeat | None:
    """The longest run of blocks of which each is the same calls as the next, and used by the next alone."""
    place = {node: (number, position) for number, calls in enumerate(blocks) for position, node in enumerate(calls)}
    pairs = [_Pair(one, other, number, place) for number, (one, other) in enumerate(zip(blocks, blocks[1:]))]
    fits = [
        pair.is_in_place and _is_closed(calls, number, place, returned)
        for number, (pair, calls) in enumerate(zip(pairs, blocks))
    ]
    best = range(0)
    start = 0
    for number in range(len(blocks)):
        if number and not (pairs[number - 1].is_equal and (fits[number - 1] or number - 1 == start)):
            start = number
        if number + 1 - start > len(best):
            best = range(start, number + 1)
    if len(best) < KEPT + FEWEST:
        return None
    own = [tuple(pairs[best[0]].own), *(tuple(pairs[number - 1].own.values()) for number in best[1:])]
    order = [dict(zip(pairs[number].own, range(len(own[0])))) for number in best[:-1]]
    if len({len(entries) for entries in own}) != 1 or not _in_one_order(own, order):
        return None
    if not all(_is_used_within(own[n], blocks[best[n]], returned) for n in range(1, len(best) - 1)):
        return None
    return Repeat(name, tuple(numbers[n] for n in best), tuple(blocks[n] for n in best), tuple(own))


def _in_one_order(own: Sequence[tuple[Node, ...]], order: Sequence[Mapping[Node, int]]) -> bool:
    """Whether each block takes its placeholders in the places of the one before, and no two share one."""
    alike = all([places.get(node) for node in nodes] == list(range(len(nodes))) for nodes, places in zip(own, order))
    return alike and len({node for nodes in own for node in nodes}) == sum(map(len, own))


def _is_used_within(own: Sequence[Node], calls: Sequence[Node], returned: Set[Node]) -> bool:
    """Whether nothing but the block uses its placeholders: a penalty on all weights does."""
    return returned.isdisjoint(own) and {user for node in own for user in node.users if user.op != "output"} <= set(
        calls
    )


class _Pair:
    """Two neighbouring blocks. ``own``: the placeholders of the first -> those of the second in their places;
    ``is_in_place``: what the second takes of the first, the first takes in the same places of the one before."""

    def __init__(
        self, one: Sequence[Node], other: Sequence[Node], number: int, place: Mapping[Node, tuple[int, int]]
    ) -> None:
        self.own: dict[Node, Node] = {}
        self._before: dict[Node, Node] = {}  # what the first takes from before -> what the second takes from the first
        self._number, self._place, self.is_in_place = number, place, True
        self.is_equal = len(one) == len(other) and all(map(self._is_equal, one, other))

    def _is_equal(self, one: Node, other: Node) -> bool:
        if one.target is not other.target or values(one) != values(other):
            return False
        (mine, shape), (its, other_shape) = flat_arguments(one), flat_arguments(other)
        return shape == other_shape and all(map(self._fits, mine, its))

    def _fits(self, one: Any, other: Any) -> bool:
        if not isinstance(one, Node) or not isinstance(other, Node):
            return type(one) is type(other) and repr(one) == repr(other)
        if one is other:
            return one not in self.own and self._place.get(one, (-1, 0))[0] < self._number
        if one.op == "placeholder" or other.op == "placeholder":
            return one.op == other.op and values(one) == values(other) and self.own.setdefault(one, other) is other
        mine, its = self._place.get(one), self._place.get(other)
        if its is None:
            return False
        if its[0] == self._number + 1:
            return mine == (self._number, its[1])
        self.is_in_place = self.is_in_place and mine == (self._number - 1, its[1])
        return its[0] == self._number and self._before.setdefault(one, other) is other


def _is_closed(calls: Sequence[Node], number: int, place: Mapping[Node, tuple[int, int]], returned: Set[Node]) -> bool:
    """Whether nothing but the block itself and the next one uses what it computes."""
    users = {user for node in calls for user in node.users}
    return returned.isdisjoint(calls) and all(place.get(user, (-1, 0))[0] in (number, number + 1) for user in users)


def short(program: Program, repeat: Repeat) -> Short:
    """The program without the dropped blocks, and without decisions."""
    dropped = {node for number in repeat.dropped for node in (*repeat.blocks[number], *repeat.own[number])}
    last, before = repeat.dropped[-1], repeat.dropped[0] - 1
    instead = dict(zip(repeat.blocks[last], repeat.blocks[before]))
    graph, copies = fx.Graph(), dict[Node, Node]()
    for node in program.graph.nodes:
        if node.op == "output" or node in dropped:
            continue
        copies[node] = copied_node(graph, node, lambda source: copies[instead.get(source, source)])
    graph.output(tuple(copies[node] for node in program.returned))
    left = {node.name for node in dropped}
    inputs = tuple(entry for entry in program.inputs if entry.node not in left)
    block = {copies[node]: place for place, number in enumerate(repeat.kept) for node in repeat.blocks[number]}
    shortened = replace(program, graph=graph, inputs=inputs, decisions={}, source=None)
    return Short(shortened, block, {copy: node for node, copy in copies.items()})
