"""Cutting sequences into intervals, against counting by hand and against trying every cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.pipeline.intervals import Event, Table, best_bounds, events_of, least_worst, totals

LENGTH = 9


@st.composite
def uses(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Where a value is made (-1: before everything), where it is used, and its weight."""
    made = draw(st.integers(-1, LENGTH - 2))
    return made, draw(st.lists(st.integers(made + 1, LENGTH - 1), max_size=4)), draw(st.integers(1, 9))


@given(st.lists(uses(), max_size=6), st.sets(st.integers(1, LENGTH - 1)))
def test_what_several_use_counts_once(values: list[tuple[int, list[int], int]], inner: set[int]) -> None:
    bounds = [0, *sorted(inner), LENGTH]
    events = [event for made, where, weight in values for event in events_of(where, weight, since=made)]
    found = totals(events, bounds)
    for a, b in itertools.combinations(range(len(bounds)), 2):
        begin, end = bounds[a], bounds[b]
        expected = sum(
            weight for made, where, weight in values if made < begin and any(begin <= use < end for use in where)
        )
        assert found[a, b] == expected, (begin, end)


def test_nothing_costs_nothing() -> None:
    assert not totals([], [0, 3, 5]).any()


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Table], Table]:
    """Times of each stage, some of them forbidden, and bytes, for the intervals between up to 8 bounds."""
    size, stages = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    numbers = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, np.inf]), min_size=size * size, max_size=size * size)
    bytes_ = st.lists(st.integers(0, 6), min_size=size * size, max_size=size * size)
    empty = np.tri(size, dtype=bool)  # an interval ends behind its begin
    tables = [np.where(empty, np.inf, np.reshape(draw(numbers), (size, size))) for _ in range(stages)]
    return tables, np.reshape(np.asarray(draw(bytes_), dtype=np.float64), (size, size))


@settings(max_examples=300)
@given(instances(), st.sampled_from([1.0, 1.5, 2.0]))
def test_as_trying_every_cut(instance: tuple[list[Table], Table], slack: float) -> None:
    tables, weights = instance
    last = len(weights) - 1
    tried = []
    for inner in itertools.combinations(range(1, last), len(tables) - 1):
        pairs = list(itertools.pairwise((0, *inner, last)))
        worst = max(table[pair] for table, pair in zip(tables, pairs))
        tried.append((sum(weights[pair] for pair in pairs), worst))
    optimum = least_worst(tables)
    assert optimum == min((worst for _, worst in tried), default=np.inf)
    if np.isinf(optimum):
        return
    bounds = best_bounds(tables, slack * optimum, weights)
    pairs = list(itertools.pairwise(bounds))
    found = sum(weights[pair] for pair in pairs), max(table[pair] for table, pair in zip(tables, pairs))
    assert (bounds[0], bounds[-1], len(pairs)) == (0, last, len(tables))
    assert found == min(entry for entry in tried if entry[1] <= slack * optimum)


def test_events_of_a_value() -> None:
    expected: list[Event] = [(3, 5, 2.0), (5, 7, 2.0)]
    assert events_of([7, 5, 5], 2.0, since=3) == expected
