"""Layers in a plain list: said once, where torch would silently not train them; registered ones are no news."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

import autopar
from autopar import Mesh
from autopar.hidden_modules import note_hidden_modules


class Listed(nn.Module):
    def __init__(self, held: object) -> None:
        super().__init__()
        self.head, self.layers = nn.Linear(2, 2), held


@pytest.mark.parametrize("held, words", [
    ([nn.Linear(2, 2), nn.Linear(2, 2)], "'0.layers' is a plain list with 2 modules (Linear)"),
    ((nn.Linear(2, 2),), "'0.layers' is a plain tuple with 1 modules"),
    ({"a": nn.Linear(2, 2)}, "nn.ModuleDict is for that"),
], ids=["list", "tuple", "dict"])  # fmt: skip
def test_hidden(held: object, words: str) -> None:
    with pytest.warns(UserWarning) as found:
        note_hidden_modules(nn.Sequential(Listed(held)))
    assert words in str(found[0].message) and len(found) == 1


def test_known_ones_are_no_news() -> None:
    shared = nn.Linear(2, 2)
    registered = Listed(nn.ModuleList([shared]))
    registered.again = [shared, nn.ReLU(), 3]  # type: ignore[assignment]
    registered.teacher = [nn.Linear(2, 2).requires_grad_(False)]  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_hidden_modules(registered)


def test_parallelize_says_it() -> None:
    with pytest.warns(UserWarning, match="not trained and not saved"):
        autopar.parallelize(Listed([nn.Linear(2, 2)]), Mesh(dp=1))
