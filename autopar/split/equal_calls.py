"""The nodes that stand in the same place of equal blocks of a program.

layers.0: a = linear(x, w0), b = gelu(a)
layers.1: c = linear(b, w1), d = gelu(c)      -->   (a, c), (b, d), (w0, w1)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import fx

from autopar.ir.arguments import flat_arguments
from autopar.ir.node import Node, origin, values

Look = Callable[[Node], Hashable]

_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def equal_nodes(graph: fx.Graph, look: Look = lambda node: None) -> list[tuple[Node, ...]]:
    """Of calls, and of placeholders that only they take in that place. No node is in two groups, none is alone.

    ``look``: what must be equal too, of calls and placeholders, for blocks to be equal.

    Blocks are the members of a list of modules (``model.layers``), from the first call of one to that of the next; of
    several kinds that take turns, those of a kind are equal.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    groups: list[tuple[Node, ...]] = []
    known: set[Node] = set()
    for blocks in sorted(_equal_blocks(calls, look), key=lambda blocks: -len(blocks) * len(blocks[0])):
        for alike in zip(*blocks):
            taken = zip(*(flat_arguments(node)[0] for node in alike))
            for nodes in (alike, *taken):
                found = [node for node in nodes if isinstance(node, Node) and node not in known]
                if len(found) == len(nodes) == len(set(found)) and (nodes is alike or _are_inputs(found)):
                    groups.append(tuple(found))
                    known.update(found)
    return groups


def _are_inputs(nodes: Sequence[Node]) -> bool:
    return all(node.op == "placeholder" for node in nodes)


def _equal_blocks(calls: Sequence[Node], look: Look) -> Iterator[list[Sequence[Node]]]:
    """For each list of modules, and each kind of block in it that it has several of, their calls."""
    for starts in _starts(calls):
        lengths = {end - start for start, end in pairwise(starts)}
        kinds: dict[Any, list[Sequence[Node]]] = {}
        for start, end in pairwise(starts):
            kinds.setdefault(_kind(calls[start:end], look), []).append(calls[start:end])
        for length in lengths:  # of the last one: nothing says where it ends
            last = calls[starts[-1] : starts[-1] + length]
            if (kind := _kind(last, look)) in kinds:
                kinds[kind].append(last)
                break
        yield from (blocks for blocks in kinds.values() if len(blocks) > 1)


def _starts(calls: Sequence[Node]) -> list[list[int]]:
    """For each list of modules, outermost ones, the positions at which the calls of its members begin."""
    seen: dict[str, dict[str, int]] = {}
    for position, node in enumerate(calls):
        found = _NUMBERED.search(origin(node).module)
        if found is not None:
            seen.setdefault(origin(node).module[: found.start(1)], {}).setdefault(found[1], position)
    return [list(members.values()) for members in seen.values()]


def _kind(calls: Sequence[Node], look: Look) -> Any:
    """Equal for blocks of the same calls of the same places in the block."""
    place = {node: position for position, node in enumerate(calls)}

    def of(node: Node) -> Any:
        leaves, shape = flat_arguments(node)
        taken = tuple(place.get(leaf, -1) if isinstance(leaf, Node) else repr(leaf) for leaf in leaves)
        inputs = (leaf for leaf in leaves if isinstance(leaf, Node) and leaf.op == "placeholder")
        return node.target, shape, taken, values(node), tuple(map(look, (node, *inputs)))

    return tuple(map(of, calls))
