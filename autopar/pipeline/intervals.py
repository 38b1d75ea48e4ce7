"""Cutting a sequence into intervals so that the worst of them is best: dynamic programming over tables.

The cost of an interval may depend on all of it: a value that several of its members use counts once. An ``Event``
expresses this: the use at ``at`` counts in an interval that begins after ``since``, the place of the use before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Event = tuple[int, int, float]  # (since, at, weight): counts in positions i .. j - 1 where since < i <= at < j


def events_of(uses: Iterable[int], weight: float, since: int = -1) -> list[Event]:
    """The events of a value used at the positions ``uses``: it counts once in each interval after ``since`` with a use.

    A value that is made at ``since`` is thus counted where it is received; with -1, everywhere.
    """
    found = []
    for at in sorted(set(uses)):
        found.append((since, at, weight))
        since = at
    return found


def totals(events: Sequence[Event], bounds: Sequence[int]) -> Table:
    """``result[a, b]``: the weights that count in positions ``bounds[a]`` up to ``bounds[b]`` (0 where a >= b).

    ``bounds`` ascend. Two-dimensional prefix sums: the time is that of the result's size and the number of events.
    """
    size = len(bounds)
    steps = np.zeros((size + 1, size + 1))
    if len(events):
        array = np.asarray(events, dtype=np.float64)
        since, at, weight = array[:, 0], array[:, 1], array[:, 2]
        edges = np.asarray(bounds)
        first = np.searchsorted(edges, since, side="right")  # the first begin after ``since``
        last = np.searchsorted(edges, at, side="right")  # the first begin, or end, after ``at``
        some = first < last
        np.add.at(steps, (first[some], last[some]), weight[some])
        np.add.at(steps, (last[some], last[some]), -weight[some])
    steps = np.cumsum(steps, axis=0, out=steps)
    return np.cumsum(steps, axis=1, out=steps)[:size, :size]


def least_worst(tables: Sequence[Table]) -> float:
    """The least cost of the worst interval, over all ways to cut from the first bound to the last.

    There are ``len(tables)`` intervals; the n-th costs ``tables[n][a, b]``, inf where it is not allowed.
    """
    worst = tables[0][0]
    for table in tables[1:]:
        worst = np.maximum(worst[:, None], table).min(axis=0)
    return float(worst[-1])


def best_bounds(tables: Sequence[Table], limit: float, weights: Table) -> list[int]:
    """The bounds (positions among those of the tables) of least total weight in which no interval costs more than
    ``limit``.

    Among equals, those whose worst interval is best. There must be some.
    """
    total, worst = np.where(tables[0][0] <= limit, weights[0], np.inf), tables[0][0]
    trail = []
    for table in tables[1:]:
        sums = np.where(table <= limit, total[:, None] + weights, np.inf)
        least = sums.min(axis=0)
        slowest = np.where(sums == least, np.maximum(worst[:, None], table), np.inf)
        trail.append(slowest.argmin(axis=0))
        total, worst = least, slowest.min(axis=0)
    assert np.isfinite(total[-1]), "no cut keeps within the limit"
    found = [len(total) - 1]
    for back in reversed(trail):
        found.append(int(back[found[-1]]))
    return [0, *reversed(found)]
