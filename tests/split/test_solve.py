"""The exact minimum over small tables, against every assignment."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from autopar.split import solve
from autopar.split.solve import CostModel, minimise


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


def test_the_first_of_equals() -> None:
    model = CostModel()
    first, second = model.variable(3), model.variable(3)
    model.add([first, second], np.zeros((3, 3)))
    model.add([second], [1.0, 0.0, 0.0])
    assert minimise(model) == [0, 1]


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
    assert counts[32] - counts[8] == 24, f"{counts}: only the sum along the chain for each of 24 more blocks, not three"


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
