"""Exact minimisation of a sum of small tables over discrete variables, by variable elimination.

The graphs are long and narrow (a transformer is a chain of blocks), so eliminating variables in the order of the
smallest resulting table stays cheap and exact: min-sum bucket elimination (Dechter 1999), linear in depth. Blocks that
repeat have equal tables, and variables of equal weight go in the order of the graph: what was worked out for one block
is taken for the others, so that time and memory hardly grow with depth.

Values that no cheapest assignment needs go first. Where tables would be too large even so, equal blocks are decided
alike, and if that is not enough variables are fixed one by one, which fixes them in all equal blocks at once.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.split.conversions import BIG
from autopar.split.cost_model import CostModel, Entry, Table, tied
from autopar.split.dominated import without_dominated

Choices = NDArray[np.unsignedinteger[Any]]
Groups = Sequence[Sequence[int]]  # of variables
LARGEST_TABLE = 20_000_000  # entries
SMALL = 4096  # entries of a table of which it is worth knowing whether it was there before
QUANTUM = 2.0**-52  # seconds: less is rounding


def minimise(model: CostModel, alike: Callable[[], Groups] = tuple) -> list[int]:
    """The assignment of least total cost. Among equals, the one with the smallest values in elimination order.

    ``alike``: the variables that stand for the same in equal blocks. They may get values that cost a little more, but
    are the same, where tables of more than ``LARGEST_TABLE`` entries would be needed.
    """
    found = _without_dominated(model, fixes=False)
    if found is None and (groups := alike()):
        one, place = tied(model, groups)
        of_one = _without_dominated(one, fixes=True)
        found = [of_one[place[v]] for v in range(len(place))] if of_one is not None else None
        found = None if found is not None and model.cost(found) > BIG / 2 else found
    if found is None:
        found = _without_dominated(model, fixes=True)
    assert found is not None
    return found


def _without_dominated(model: CostModel, fixes: bool) -> list[int] | None:
    smaller, kept = without_dominated(model)
    found = _Elimination(smaller, fixes).run()
    return None if found is None else [int(values[number]) for values, number in zip(kept, found)]


class _Elimination:
    """``fixes``: variables are fixed where a table would be too large; else there is no result then."""

    def __init__(self, model: CostModel, fixes: bool = False) -> None:
        self.model, self.fixes, self.known = model, fixes, _Known()
        self.buckets: list[dict[int, Entry]] = [{} for _ in model.sizes]
        self.next_key = 0
        for scope, table in model.tables:
            self._put((scope, self.known.one_of(table)))
        self.done = [False] * len(model.sizes)
        self.trail: list[tuple[int, tuple[int, ...], Choices]] = []

    def run(self) -> list[int] | None:
        queue = [(_weight(self.model, self.buckets, v), v) for v in range(len(self.model.sizes))]
        heapq.heapify(queue)
        while queue:
            weight, variable = heapq.heappop(queue)
            if self.done[variable] or weight != _weight(self.model, self.buckets, variable):
                continue
            if weight > LARGEST_TABLE and not self.fixes:
                return None
            if weight > LARGEST_TABLE:
                wide = max(self._near(variable), key=lambda v: (self.model.sizes[v], -v))
                near = self._near(wide)
                self._fix(wide)
            else:
                near = self._near(variable)
                self._eliminate(variable)
            for v in near:
                if not self.done[v]:
                    heapq.heappush(queue, (_weight(self.model, self.buckets, v), v))
        assignment = [0] * len(self.model.sizes)
        for variable, others, best in reversed(self.trail):
            assignment[variable] = int(best[tuple(assignment[v] for v in others)])
        return assignment

    def _near(self, variable: int) -> set[int]:
        """``variable`` and those with which it has a table."""
        return {v for scope, _ in self.buckets[variable].values() for v in scope} | {variable}

    def _put(self, entry: Entry) -> None:
        for variable in entry[0]:
            self.buckets[variable][self.next_key] = entry
        self.next_key += 1

    def _taken(self, variable: int) -> list[Entry]:
        """The tables on ``variable``, which are no more."""
        entries = list(self.buckets[variable].items())
        for key, (scope, _) in entries:
            for v in scope:
                del self.buckets[v][key]
        self.done[variable] = True
        return [entry for _, entry in entries]

    def _eliminate(self, variable: int) -> None:
        entries = self._taken(variable)
        others = tuple(sorted({v for scope, _ in entries for v in scope} - {variable}))
        least, best = self.known.least(self.model, entries, variable, others)
        self.trail.append((variable, others, best))
        if others:
            self._put((others, least))

    def _fix(self, variable: int) -> None:
        """Fix ``variable`` to the value of the least lower bound."""
        bound = np.zeros(self.model.sizes[variable])
        entries = self._taken(variable)
        for entry_scope, table in entries:
            bound += table.min(axis=tuple(axis for axis, v in enumerate(entry_scope) if v != variable))
        number = int(bound.argmin())
        self.trail.append((variable, (), np.array(number, dtype=np.min_scalar_type(number))))
        for entry_scope, table in entries:
            rest = tuple(v for v in entry_scope if v != variable)
            if rest:
                part = np.ascontiguousarray(table.take(number, axis=entry_scope.index(variable)))
                self._put((rest, self.known.one_of(part)))


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
        least = self.one_of(least) if least.size <= SMALL else least
        self._results[key] = weakref.ref(least), [weakref.ref(table) for _, table in entries], best
        return least, best


def _weight(model: CostModel, buckets: list[dict[int, Entry]], variable: int) -> int:
    weight = 1
    for v in {v for scope, _ in buckets[variable].values() for v in scope} | {variable}:
        weight *= model.sizes[v]
    return weight


def _least(model: CostModel, entries: Sequence[Entry], variable: int, others: tuple[int, ...]) -> tuple[Table, Choices]:
    """The least of the sum of ``entries`` over ``variable``, by the values of ``others``, less the least of all, and
    the first value that has it. The sum is held for one value at a time."""
    position = {v: i for i, v in enumerate(others)}
    aligned = [_aligned(scope, table, variable, position) for scope, table in entries]
    shape = [model.sizes[v] for v in others]
    least = _sum(aligned, 0, shape)
    best: Choices = np.zeros(shape, dtype=np.min_scalar_type(model.sizes[variable]))
    for number in range(1, model.sizes[variable]):
        total = _sum(aligned, number, shape)
        np.copyto(best, number, where=total < least)
        np.minimum(least, total, out=least)
    least -= least.min()  # what all values cost decides nothing
    return np.asarray(np.round(least / QUANTUM) * QUANTUM), best  # along a chain of equal blocks, tables become equal


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
