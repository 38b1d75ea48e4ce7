"""The values of a region that backward keeps and those it recomputes, at which price: minimum cuts.

Each value is two points, ``made`` and ``there``. A cut between the source (forward) and the sink (backward) that goes

    made -> there      keeps the value             capacity: its bytes
    source -> made     recomputes the value        capacity: its work

An edge without limit leads from ``there`` of an operand to ``made`` of each value computed from it, so every recomputed
value has its operands. With prices for both, the cheapest cut is the best choice at that exchange rate; all rates
together give the choices that no mixture of others beats. (Min-cut rematerialisation, as in torch's
``min_cut_rematerialization_partition``, whose cut knows bytes only: the work is a second capacity here, and takes the
place of its knapsack. That partitioner itself requires a whole AOTAutograd joint graph with its metadata, decides for
all layers at once rather than for one of them, knows neither our operators nor their cost, and never recomputes a
collective.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

SOURCE, SINK = -1, -2


@dataclass(frozen=True)
class Item:
    """One value of a region.

    It has the positions of its operands, which are before it; the bytes that keeping it takes; the operations that
    recomputing it takes (None: impossible); and whether backward itself needs it.
    """

    operands: tuple[int, ...]
    bytes: int | None
    work: int | None
    needed: bool = False


Region = tuple[Item, ...]  # equal regions, those of repeated blocks, are solved once


@dataclass(frozen=True)
class Choice:
    """The positions of the values that are kept and of those that are recomputed; the bytes and operations of that."""

    kept: frozenset[int]
    recomputed: frozenset[int]
    bytes: int
    work: int


def fewest_bytes(region: Region) -> Choice:
    """The choice with the least work among those that keep the fewest bytes."""
    total = sum(item.work or 0 for item in region)
    return _cheapest(region, total + 1, 1)


def least_work(region: Region) -> Choice:
    """The choice that keeps the fewest bytes among those with the least work."""
    total = sum(item.bytes or 0 for item in region)
    return _cheapest(region, 1, total + 1)


@lru_cache(maxsize=256)
def frontier(region: Region) -> tuple[Choice, ...]:
    """From the least work to the fewest bytes, the choices on the lower hull of (bytes, work)."""
    first, last = least_work(region), fewest_bytes(region)
    return (first, *_between(region, first, last), last) if first.bytes > last.bytes else (first,)


def _between(region: Region, heavy: Choice, light: Choice) -> tuple[Choice, ...]:
    """The choices strictly below the line from ``heavy`` (more bytes) to ``light`` (more work)."""
    byte, operation = light.work - heavy.work, heavy.bytes - light.bytes
    found = _cheapest(region, byte, operation)
    if byte * found.bytes + operation * found.work >= byte * heavy.bytes + operation * heavy.work:
        return ()
    return (*_between(region, heavy, found), found, *_between(region, found, light))


@lru_cache(maxsize=4096)
def _cheapest(region: Region, byte: int, operation: int) -> Choice:
    """The choice of the lowest price, where keeping a byte costs ``byte`` and an operation ``operation``."""
    import networkx as nx  # 10 MB, for who recomputes

    graph = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    for position, item in enumerate(region):
        made, there = 2 * position, 2 * position + 1
        _connect(graph, SOURCE, made, None if item.work is None else item.work * operation)
        _connect(graph, made, there, None if item.bytes is None else item.bytes * byte)
        if item.work is not None:
            for operand in item.operands:
                _connect(graph, 2 * operand + 1, made, None)
        if item.needed:
            _connect(graph, there, SINK, None)
    _, (_, late) = nx.minimum_cut(graph, SOURCE, SINK)
    recomputed = frozenset(i for i in range(len(region)) if 2 * i in late)
    kept = frozenset(i for i in range(len(region)) if 2 * i + 1 in late) - recomputed
    return Choice(
        kept, recomputed, sum(region[i].bytes or 0 for i in kept), sum(region[i].work or 0 for i in recomputed)
    )


def _connect(graph: nx.DiGraph, start: int, end: int, capacity: int | None) -> None:
    """Add an edge; None is no limit."""
    if capacity is None:
        graph.add_edge(start, end)
    else:
        graph.add_edge(start, end, capacity=capacity)
