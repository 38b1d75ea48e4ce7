"""Exact minimisation of a sum of small tables over discrete variables, by variable elimination.

The graphs are long and narrow (a transformer is a chain of blocks), so eliminating variables in the order of the
smallest resulting table stays cheap and exact: min-sum bucket elimination (Dechter 1999), linear in depth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
LARGEST_TABLE = 20_000_000  # entries; beyond it variables are fixed one by one instead


@dataclass
class CostModel:
    """Variables with finite domains, and cost tables over one or more of them; the sum of the tables is minimised."""

    sizes: list[int] = field(default_factory=list)
    tables: list[tuple[tuple[int, ...], Table]] = field(default_factory=list)

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
    buckets: list[dict[int, tuple[tuple[int, ...], Table]]] = [{} for _ in model.sizes]
    alive: dict[int, tuple[tuple[int, ...], Table]] = {}
    for key, entry in enumerate(model.tables):
        alive[key] = entry
        for variable in entry[0]:
            buckets[variable][key] = entry
    queue = [(_weight(model, buckets, v), v) for v in range(len(model.sizes))]
    heapq.heapify(queue)
    done = [False] * len(model.sizes)
    trail: list[tuple[int, tuple[int, ...], NDArray[np.intp]]] = []
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
        total = _joined(model, entries, (variable, *others))
        trail.append((variable, others, total.argmin(axis=0)))
        done[variable] = True
        for key in list(buckets[variable]):
            scope, _ = buckets[variable][key]
            for v in scope:
                if v != variable:
                    del buckets[v][key]
        if others:
            message = (others, total.min(axis=0))
            for v in others:
                buckets[v][next_key] = message
            next_key += 1
    assignment = [0] * len(model.sizes)
    for variable, others, best in reversed(trail):
        assignment[variable] = int(best[tuple(assignment[v] for v in others)])
    return assignment


def _weight(model: CostModel, buckets: list[dict[int, tuple[tuple[int, ...], Table]]], variable: int) -> int:
    scope = {v for entry_scope, _ in buckets[variable].values() for v in entry_scope} | {variable}
    weight = 1
    for v in scope:
        weight *= model.sizes[v]
    return weight


def _joined(model: CostModel, entries: Sequence[tuple[tuple[int, ...], Table]], order: tuple[int, ...]) -> Table:
    position = {v: i for i, v in enumerate(order)}
    total = np.zeros([model.sizes[v] for v in order])
    for scope, table in entries:
        by_position = sorted(range(len(scope)), key=lambda i: position[scope[i]])
        shape = [1] * len(order)
        for i in by_position:
            shape[position[scope[i]]] = table.shape[i]
        total += table.transpose(by_position).reshape(shape)
    return total


def _simplify(model: CostModel, buckets: list[dict[int, tuple[tuple[int, ...], Table]]], variable: int) -> None:
    """Replace wide tables on ``variable`` by lower bounds on one neighbour each (mini-buckets): no longer exact."""
    for key, (scope, table) in list(buckets[variable].items()):
        if len(scope) <= 2:
            continue
        for v in scope:
            del buckets[v][key]
        axes = tuple(i for i, v in enumerate(scope) if v != variable)
        buckets[variable][key] = ((variable,), table.min(axis=axes))
