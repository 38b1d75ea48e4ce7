"""The exact minimum over small tables, against every assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

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
