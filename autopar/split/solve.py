"""Exact minimisation of a sum of small tables over discrete variables, by variable elimination.

The graphs are long and narrow (a transformer is a chain of blocks), so eliminating variables in the order of the
smallest resulting table stays cheap and exact: min-sum bucket elimination (Dechter 1999), linear in depth. Blocks that
repeat have equal tables, and variables of equal weight go in the order of the graph: what was worked out for one block
is taken for the others, so that time and memory hardly grow with depth.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Entry = tuple[tuple[int, ...], Table]  # a table over these variables
Choices = NDArray[np.unsignedinteger[Any]]
LARGEST_TABLE = 20_000_000  # entries; beyond it variables are fixed one by one instead


@dataclass
class CostModel:
    """Variables with finite domains, and cost tables over one or more of them; the sum of the tables is minimised."""

    sizes: list[int] = field(default_factory=list)
    tables: list[Entry] = field(default_factory=list)

    def variable(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def add(self, variables: Sequence[int], table: Any) -> None:
        """Add a table whose dims are the domains of ``variables`` (distinct), in their order."""
        array = np.asarray(table, dtype=np.float64)
        assert array.shape == tuple(self.sizes[v] for v in variables), (array.shape, variables)
        open_ones = tuple(v for v in variables if self.sizes[v] > 1)  # a variable with one value decides nothing
        self.tables.append((open_ones, array.reshape([self.sizes[v] for v in open_ones])))

    def cost(self, assignment: Sequence[int]) -> float:
        return float(sum(table[tuple(assignment[v] for v in variables)] for variables, table in self.tables))


def minimise(model: CostModel) -> list[int]:
    """The assignment of least total cost. Among equals, the one with the smallest values in elimination order."""
    known = _Known()
    buckets: list[dict[int, Entry]] = [{} for _ in model.sizes]
    for key, (scope, table) in enumerate(model.tables):
        entry = scope, known.one_of(table)
        for variable in scope:
            buckets[variable][key] = entry
    queue = [(_weight(model, buckets, v), v) for v in range(len(model.sizes))]
    heapq.heapify(queue)
    done = [False] * len(model.sizes)
    trail: list[tuple[int, tuple[int, ...], Choices]] = []
    next_key = len(model.tables)
    while queue:
        weight, variable = heapq.heappop(queue)
        if done[variable]:
            continue
        current = _weight(model, buckets, variable)
        if current > weight:
            heapq.heappush(queue, (current, variable))
            continue
        if current > LARGEST_TABLE:
            _simplify(model, buckets, variable)
        entries = list(buckets[variable].values())
        others = tuple(sorted({v for scope, _ in entries for v in scope} - {variable}))
        least, best = known.least(model, entries, variable, others)
        trail.append((variable, others, best))
        done[variable] = True
        for key, (scope, _) in list(buckets[variable].items()):
            for v in scope:
                del buckets[v][key]
        if others:
            for v in others:
                buckets[v][next_key] = (others, least)
            next_key += 1
    assignment = [0] * len(model.sizes)
    for variable, others, best in reversed(trail):
        assignment[variable] = int(best[tuple(assignment[v] for v in others)])
    return assignment


class _Known:
    """What was worked out before: a table for each content, a result for each sum of tables in the same places."""

    def __init__(self) -> None:
        self._tables: dict[tuple[tuple[int, ...], bytes], Table] = {}
        self._results: dict[Any, tuple[weakref.ref[Table], list[weakref.ref[Table]], Choices]] = {}

    def one_of(self, table: Table) -> Table:
        """The first table that had this content."""
        return self._tables.setdefault((table.shape, table.tobytes()), table)

    def least(
        self, model: CostModel, entries: Sequence[Entry], variable: int, others: tuple[int, ...]
    ) -> tuple[Table, Choices]:
        """As :func:`_least`. A result is remembered while its table is in use; its choices are those of the trail."""
        position = {v: place for place, v in enumerate((variable, *others))}
        sizes = tuple(model.sizes[v] for v in position)
        key = sizes, tuple((tuple(position[v] for v in scope), id(table)) for scope, table in entries)
        if key in self._results:
            found, terms, choices = self._results[key]
            table = found()
            if table is not None and all(term() is entry[1] for term, entry in zip(terms, entries)):
                return table, choices
        least, best = _least(model, entries, variable, others)
        self._results[key] = weakref.ref(least), [weakref.ref(table) for _, table in entries], best
        return least, best


def _weight(model: CostModel, buckets: list[dict[int, Entry]], variable: int) -> int:
    scope = {v for entry_scope, _ in buckets[variable].values() for v in entry_scope} | {variable}
    weight = 1
    for v in scope:
        weight *= model.sizes[v]
    return weight


def _least(model: CostModel, entries: Sequence[Entry], variable: int, others: tuple[int, ...]) -> tuple[Table, Choices]:
    """The least of the sum of ``entries`` over ``variable``, by the values of ``others``, and the first value that has
    it. The sum is held for one value at a time."""
    position = {v: i for i, v in enumerate(others)}
    aligned = [_aligned(scope, table, variable, position) for scope, table in entries]
    shape = [model.sizes[v] for v in others]
    least = _sum(aligned, 0, shape)
    best: Choices = np.zeros(shape, dtype=np.min_scalar_type(model.sizes[variable]))
    for number in range(1, model.sizes[variable]):
        total = _sum(aligned, number, shape)
        np.copyto(best, number, where=total < least)
        np.minimum(least, total, out=least)
    return least, best


def _aligned(scope: tuple[int, ...], table: Table, variable: int, position: dict[int, int]) -> Table:
    """``table`` with ``variable`` in front and a dim for each place of ``position``, of size 1 where it has none."""
    ordered = sorted(range(len(scope)), key=lambda i: position.get(scope[i], -1))
    shape = [1] * (1 + len(position))
    for i in ordered:
        shape[1 + position.get(scope[i], -1)] = table.shape[i]
    return table.transpose(ordered).reshape(shape)


def _sum(aligned: Sequence[Table], number: int, shape: Sequence[int]) -> Table:
    total = np.zeros(shape)
    for table in aligned:
        total += table[number]
    return total


def _simplify(model: CostModel, buckets: list[dict[int, Entry]], variable: int) -> None:
    """Replace wide tables on ``variable`` by lower bounds on one neighbour each (mini-buckets): no longer exact."""
    for key, (scope, table) in list(buckets[variable].items()):
        if len(scope) <= 2:
            continue
        for v in scope:
            del buckets[v][key]
        axes = tuple(i for i, v in enumerate(scope) if v != variable)
        buckets[variable][key] = ((variable,), table.min(axis=axes))
