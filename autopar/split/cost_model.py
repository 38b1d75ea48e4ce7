"""A sum of small tables over discrete variables: what the choice of layouts minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Entry = tuple[tuple[int, ...], Table]  # a table over these variables


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


def tied(model: CostModel, groups: Sequence[Sequence[int]]) -> tuple[CostModel, list[int]]:
    """The model in which the variables of a group have one value, and for each variable of ``model`` which it is there.

    The variables of a group have equally many values; no variable is in two groups. Costs are summed.
    """
    first = {variable: group[0] for group in groups for variable in group}
    kept = [variable for variable in range(len(model.sizes)) if first.get(variable, variable) == variable]
    number = {variable: place for place, variable in enumerate(kept)}
    place = [number[first.get(variable, variable)] for variable in range(len(model.sizes))]
    sums: dict[tuple[int, ...], Table] = {}
    for scope, table in model.tables:
        found = tuple(place[variable] for variable in scope)
        where = tuple(dict.fromkeys(found))
        operands: list[Any] = [table, [where.index(variable) for variable in found], list(range(len(where)))]
        once = np.einsum(*operands)
        sums[where] = sums[where] + once if where in sums else once
    return CostModel([model.sizes[variable] for variable in kept], list(sums.items())), place
