"""A cost model without the values that no cheapest assignment needs.

    x in {a, b, c}, f(x, y) = [[1, 2], [3, 2], [9, 9]]   -->   x in {a, b}: whatever y is, a costs less than c

A value goes where another one of its variable costs no more whatever the neighbours are: the sum over its tables of the
least differences is not negative (dead-end elimination, Goldstein 1994). Tables that are equal, as those of blocks that
repeat, are compared once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.split.cost_model import CostModel, Table

Kept = NDArray[np.intp]  # the values of a variable that are left, in order
_NOTHING = 1e-15  # seconds: a lead that may be rounding


def without_dominated(model: CostModel) -> tuple[CostModel, list[Kept]]:
    """``model`` with smaller domains, of the same least cost, and for each of its variables the values that are left.

    Of values that cost the same whatever the others are, the first is left.
    """
    return _Pruning(model).run()


class _Pruning:
    def __init__(self, model: CostModel) -> None:
        self.kept: list[Kept] = [np.arange(size) for size in model.sizes]
        self.scopes = [scope for scope, _ in model.tables]
        self.tables = [table for _, table in model.tables]
        self.touching: list[list[tuple[int, int]]] = [[] for _ in model.sizes]  # the tables of each variable, and where
        for number, scope in enumerate(self.scopes):
            for position, variable in enumerate(scope):
                self.touching[variable].append((number, position))
        self.known: dict[tuple[tuple[int, ...], bytes], Table] = {}
        self.leads: dict[tuple[int, int], Table] = {}
        self.rests: dict[tuple[tuple[int, int], ...], Kept] = {}
        self.parts: dict[Any, Table] = {}

    def run(self) -> tuple[CostModel, list[Kept]]:
        self.tables = list(map(self._one_of, self.tables))
        waiting: dict[int, None] = dict.fromkeys(v for v, kept in enumerate(self.kept) if len(kept) > 1)
        while waiting:
            rests = {variable: self._rest(variable) for variable in waiting}
            shorter = {v: rest for v, rest in rests.items() if len(rest) < len(self.kept[v])}
            waiting = self._restrict(shorter)
        smaller = CostModel([len(kept) for kept in self.kept])
        for scope, table in zip(self.scopes, self.tables):
            smaller.add(scope, table)
        return smaller, self.kept

    def _one_of(self, table: Table) -> Table:
        """The first table that had this content; all of them are held until the end, so that an id tells one."""
        return self.known.setdefault((table.shape, table.tobytes()), table)

    def _rest(self, variable: int) -> Kept:
        """The places of the present values of ``variable`` that are not dominated."""
        key = tuple((id(self.tables[number]), position) for number, position in self.touching[variable])
        if key not in self.rests:
            size = len(self.kept[variable])
            lead = np.zeros((size, size))
            for number, position in self.touching[variable]:
                lead += self._lead(self.tables[number], position)
            earlier = np.arange(size)[None, :] < np.arange(size)[:, None]
            dominated = (lead > _NOTHING) | ((lead >= -_NOTHING) & earlier)
            left = np.ones(size, dtype=bool)
            for value in np.flatnonzero(dominated.any(axis=1)):  # by one that is left: leads that are rounding may form
                left[value] = not (dominated[value] & left).any()  # a circle
            self.rests[key] = np.flatnonzero(left)
        return self.rests[key]

    def _lead(self, table: Table, position: int) -> Table:
        """(values, values): by how much the second one is cheaper at least, whatever the other variables are."""
        key = id(table), position
        if key not in self.leads:
            flat = np.moveaxis(table, position, 0).reshape(table.shape[position], -1)
            self.leads[key] = np.stack([(row[None, :] - flat).min(axis=1) for row in flat])
        return self.leads[key]

    def _restrict(self, rests: dict[int, Kept]) -> dict[int, None]:
        """Take the tables apart; gives the variables whose tables have changed."""
        changed: dict[int, None] = {}
        for variable, rest in rests.items():
            self.kept[variable] = self.kept[variable][rest]
        for number in dict.fromkeys(number for variable in rests for number, _ in self.touching[variable]):
            scope = self.scopes[number]
            self.tables[number] = self._part(self.tables[number], [rests.get(variable) for variable in scope])
            changed |= dict.fromkeys(variable for variable in scope if len(self.kept[variable]) > 1)
        return changed

    def _part(self, table: Table, rests: Sequence[Kept | None]) -> Table:
        key = id(table), tuple(None if rest is None else rest.tobytes() for rest in rests)
        if key not in self.parts:
            part = table
            for position, rest in enumerate(rests):
                part = part if rest is None else part.take(rest, axis=position)
            self.parts[key] = self._one_of(np.ascontiguousarray(part))
        return self.parts[key]
