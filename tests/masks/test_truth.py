"""Formulas joined by and, or and not, against their values at all positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from autopar.masks import truth
from autopar.operators.predicates import Before, Bound, Chunk, Compare, Flag, Term, Within, parse

S = 6
TERMS: list[Term] = [
    Before(),
    Before(2),
    Within(2),
    Chunk(3),
    Bound("j", 2),
    Compare(0, "==", 0),
    Flag(1, "j"),
    Flag(1, "i"),
]
VECTORS = [torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([True, False, True, True, False, True])]


def values(found: truth.Truth) -> Tensor:
    positions = torch.arange(S)
    return (
        truth.formula(found).evaluate(positions, positions, VECTORS).expand(S, S)
        if () not in map(tuple, found)
        else torch.zeros(S, S, dtype=torch.bool)
    )


@pytest.mark.parametrize(("a", "b"), itertools.combinations(TERMS, 2), ids=str)
def test_joined(a: Term, b: Term) -> None:
    first, second = truth.of(a), truth.of(b)
    x, y = values(first), values(second)
    assert torch.equal(values(truth.both(first, second)), x & y)
    assert torch.equal(values(truth.either(first, second)), x | y)
    assert torch.equal(values(truth.opposite(truth.both(first, second))), ~(x & y))
    assert torch.equal(values(truth.opposite(truth.either(first, second))), ~(x | y))
    for number in range(16):
        table = {state: bool(number >> n & 1) for n, state in enumerate(itertools.product((True, False), repeat=2))}
        wanted = torch.tensor([[table[bool(p), bool(q)] for p, q in zip(*rows)] for rows in zip(x, y)])
        assert torch.equal(values(truth.of_table((first, second), table.__getitem__)), wanted)


@pytest.mark.parametrize("number", range(0, 256, 5))
def test_tables_of_three(number: int) -> None:
    parts = [truth.of(Before()), truth.of(Flag(1, "j")), truth.of(Compare(0, "==", 0))]
    table = {state: bool(number >> n & 1) for n, state in enumerate(itertools.product((True, False), repeat=3))}
    found = values(truth.of_table(parts, table.__getitem__))
    x, y, z = map(values, parts)
    for i, j in itertools.product(range(S), range(S)):
        assert found[i, j] == table[bool(x[i, j]), bool(y[i, j]), bool(z[i, j])]


def test_what_follows_is_dropped() -> None:
    one = truth.both(truth.of(Before()), truth.of(Before(3)), truth.either(truth.of(Before(1)), truth.of(Within(2))))
    assert str(truth.formula(one)) == "j<=i"
    assert truth.either(truth.of(Before()), truth.of(Before().opposite())) == truth.TRUE
    assert truth.over(truth.of(Bound("i", 0, below=False)), S, S) == truth.TRUE
    assert truth.over(truth.of(Before(-S)), S, S) == truth.FALSE
    with pytest.raises(truth.TooLongError):
        truth.both(*(truth.of(Flag(n, "j")) for n in range(truth.MOST_CLAUSES + 1)))


@pytest.mark.parametrize(
    ("text", "keeps"),
    [("j<=i", True), ("j<=i & i-j<1", True), ("j<=i-1", False), ("i-j<0", False), ("j<=i | v0[j]", True),
     ("v0[j]", False), ("v0[i]==v0[j] & j<=i", True), ("v0[i]==v1[j]", False),
     ("i//4==j//4", True), ("i//4!=j//4", False), ("", True)],
)  # fmt: skip
def test_rows_that_keep_a_key(text: str, keeps: bool) -> None:
    found = frozenset(map(frozenset, parse(text).clauses))
    assert truth.leaves_each_row_a_key(found, S, S) == keeps
    assert truth.leaves_each_row_a_key(found, S, S - 1) is False
