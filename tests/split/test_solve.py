"""The minimum over small tables, against every assignment; and what is chosen where tables would be too large."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from autopar.split import solve
from autopar.split.conversions import BIG
from autopar.split.cost_model import CostModel, tied
from autopar.split.dominated import without_dominated
from autopar.split.solve import minimise


def random_model(seed: int) -> CostModel:
    """A chain of variables of one to four values, with tables of up to three neighbours."""
    random = np.random.default_rng(seed)
    model = CostModel()
    variables = [model.variable(int(size)) for size in random.integers(1, 5, size=7)]
    for start in range(len(variables)):
        scope = random.permutation(variables[start : start + int(random.integers(1, 4))])
        model.add([int(v) for v in scope], random.integers(0, 9, [model.sizes[v] for v in scope]))
    return model


@pytest.mark.parametrize("seed", range(20))
def test_least(seed: int) -> None:
    model = random_model(seed)
    every = itertools.product(*map(range, model.sizes))
    assert model.cost(minimise(model)) == min(map(model.cost, every))


@pytest.mark.parametrize("seed", range(20))
def test_without_values_that_nothing_needs(seed: int) -> None:
    """The same least cost; a chain of tables with equal rows loses values, not those that others need."""
    model = random_model(seed)
    smaller, kept = without_dominated(model)
    every = itertools.product(*map(range, smaller.sizes))
    found = [int(values[number]) for values, number in zip(kept, min(every, key=smaller.cost))]
    assert model.cost(found) == model.cost(minimise(model))
    assert sum(smaller.sizes) < sum(model.sizes)


def test_a_value_that_some_neighbour_needs_stays() -> None:
    model = CostModel()
    one, other = model.variable(3), model.variable(2)
    model.add([one, other], [[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]])
    smaller, kept = without_dominated(model)
    assert [list(values) for values in kept] == [[0, 1], [0, 1]]


def _of_blocks(blocks: int, wide: int) -> tuple[CostModel, list[list[int]]]:
    """Blocks of ``wide`` variables, each with a table with each other, and a link to the next block; their groups."""
    generator, model = np.random.default_rng(14), CostModel()
    numbers = [[model.variable(3) for _ in range(wide)] for _ in range(blocks)]
    for places in itertools.combinations(range(wide), 2):
        table = generator.integers(0, 99, (3, 3))
        for block in numbers:
            model.add([block[place] for place in places], table)
    link = generator.integers(0, 99, (3, 3))
    for one, other in itertools.pairwise(numbers):
        model.add((one[-1], other[0]), link)
    return model, [list(group) for group in zip(*numbers)]


def test_equal_blocks_are_decided_alike_where_tables_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = _of_blocks(6, 4)
    one, place = tied(model, groups)
    every = itertools.product(*map(range, one.sizes))
    best = min(every, key=one.cost)
    assert one.cost(best) == model.cost([best[number] for number in place])
    assert len({tuple(minimise(model)[v] for v in block) for block in zip(*groups)}) > 1  # ends are cheaper otherwise
    monkeypatch.setattr(solve, "LARGEST_TABLE", 80)  # three variables of three values, and not a fourth
    monkeypatch.setattr(solve, "_without_dominated", _with_all_values)
    found = minimise(model, lambda: groups)
    assert len({tuple(found[v] for v in block) for block in zip(*groups)}) == 1
    assert model.cost(found) == one.cost(best)
    one_by_one = minimise(model)
    assert len({tuple(one_by_one[v] for v in block) for block in zip(*groups)}) > 2


def _with_all_values(model: CostModel, fixes: bool) -> list[int] | None:
    return solve._Elimination(model, fixes).run()


def test_what_no_equal_choice_fits_is_chosen_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that may not have equal values."""
    model = CostModel()
    numbers = [model.variable(3) for _ in range(5)]
    for one, other in itertools.combinations(numbers, 2):
        model.add((one, other), np.eye(3) * BIG if other == one + 1 else np.zeros((3, 3)))
    monkeypatch.setattr(solve, "LARGEST_TABLE", 9)
    assert model.cost(minimise(model, lambda: [numbers])) == 0.0


def test_the_first_of_equals() -> None:
    model = CostModel()
    first, second = model.variable(3), model.variable(3)
    model.add([first, second], np.zeros((3, 3)))
    model.add([second], [1.0, 0.0, 0.0])
    assert minimise(model) == [0, 1]


def test_a_circle_of_leads_that_are_rounding() -> None:
    """Each of the three values is dominated by another one."""
    model = CostModel()
    model.add([model.variable(3)], [1.6e-15, 0.8e-15, 0.0])
    assert model.cost(minimise(model)) < 1e-15


def test_more_values_than_a_byte_counts() -> None:
    model = CostModel()
    wide, narrow = model.variable(300), model.variable(2)
    model.add([wide, narrow], np.abs(np.arange(300)[:, None] - np.array([280, 290])))
    model.add([narrow], [0.5, 0.0])
    assert minimise(model) == [290, 1]


def test_blocks_that_repeat_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least cost of a chain of equal blocks, with one sum for the inside of all of them."""
    plain, sums, counts = solve._least, itertools.count(), {}

    def counted(*given: Any) -> Any:
        next(sums)
        return plain(*given)

    monkeypatch.setattr(solve, "_least", counted)
    for blocks in (8, 32):
        start, model = next(sums), _chain(blocks)
        assert model.cost(minimise(model)) == pytest.approx(_least_of_chain(model))
        counts[blocks] = next(sums) - start
    assert counts[32] - counts[8] < 24, f"{counts}: not one sum for each of 24 more blocks, of three variables each"


def _chain(blocks: int) -> CostModel:
    """Blocks of three variables, each table the same in every block."""
    generator = np.random.default_rng(0)
    inner, wide, link = generator.random((3, 4)), generator.random((3, 4, 2)), generator.random((2, 3))
    model, last = CostModel(), None
    for _ in range(blocks):
        a, b, c = model.variable(3), model.variable(4), model.variable(2)
        model.add((a, b), inner)
        model.add((a, b, c), wide)
        if last is not None:
            model.add((last, a), link)
        last = c
    return model


def _least_of_chain(model: CostModel) -> float:
    """By dynamic programming along the chain: cost to reach each value of the last variable of a block."""
    inner, wide, link = model.tables[0][1], model.tables[1][1], model.tables[4][1]
    block = (inner[:, :, None] + wide).min(axis=1)  # (a, c)
    reached = block.min(axis=0)
    for _ in range(len(model.sizes) // 3 - 1):
        entry = (reached[:, None] + link).min(axis=0)
        reached = (entry[:, None] + block).min(axis=0)
    return float(reached.min())
