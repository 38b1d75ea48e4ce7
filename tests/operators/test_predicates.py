"""Formulas over positions: text, values, and what they say about rectangles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from autopar.operators.predicates import Formula, parse

TEXTS = (
    "",
    "j<=i",
    "j<=i+3",
    "j<=i-2",
    "i-j<4",
    "i-j<5 & j<=i+4",
    "j<=i & i-j<4",
    "i//4==j//4",
    "i//3!=j//3",
    "j<5 | j<=i",
    "j<=i & i>=2 & (j<3 | v0[i]==v0[j]) & v2[j]",
    "v0[i]==v0[j]",
    "v0[i]!=v1[j]",
    "v1[i]<=v1[j]",
    "v1[i]<v1[j]",
    "v1[i]>=v0[j]",
    "v1[i]>v0[j]",
    "v2[j]",
    "!v2[i] & v2[j]",
)
S = 12


def _vectors() -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randint(0, 3, (2, S)).sort(-1).values,
        torch.arange(S),
        torch.arange(S) > torch.tensor([[1], [4]]),
    ]


def _expected(text: str, i: int, j: int, row: int) -> bool:
    """The text as Python reads it."""
    text = text.replace("!v", "not v").replace("&", " and ").replace("|", " or ")
    vectors = {f"v{n}": v.expand(2, S)[row].tolist() for n, v in enumerate(_vectors())}
    return bool(eval(text, {"i": i, "j": j, **vectors})) if text else True


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_those_of_the_text(text: str) -> None:
    positions = torch.arange(S)
    found = parse(text).evaluate(positions, positions, _vectors()).expand(2, S, S)
    for row, i, j in itertools.product(range(2), range(S), range(S)):
        assert found[row, i, j] == _expected(text, i, j, row), (row, i, j)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_back(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_opposites(text: str) -> None:
    positions, vectors = torch.arange(S), _vectors()
    for term in parse(text).terms:
        opposite = term.opposite()
        assert opposite.opposite() == term
        found, other = (x.evaluate(positions, positions, vectors).expand(2, S, S) for x in (term, opposite))
        assert torch.equal(found, other.logical_not())
        assert parse(str(opposite)).terms == (opposite,)


@pytest.mark.parametrize("read", (False, True))
@pytest.mark.parametrize("text", TEXTS)
def test_rectangles(text: str, read: bool) -> None:
    """What is said of a rectangle is true of each of its elements, and what is left says the same as the whole."""
    formula, vectors = parse(text), _vectors()
    edges = (0, 1, 3, 4, 7, 8, S)
    said = {"all": 0, "none": 0, "mixed": 0}
    for top, bottom, left, right in itertools.product(edges, repeat=4):
        if top >= bottom or left >= right:
            continue
        rows, columns = range(top, bottom), range(left, right)
        found = formula.evaluate(torch.tensor(rows), torch.tensor(columns), vectors)
        state = formula.classify(rows, columns, vectors if read else None)
        said[state] += 1
        assert state == "mixed" or bool((found == (state == "all")).all())
        rest = formula.rest(rows, columns, vectors if read else None)
        if rest is not None:
            assert torch.equal(
                *torch.broadcast_tensors(rest.evaluate(torch.tensor(rows), torch.tensor(columns), vectors), found)
            )
        if bool(found.all()) or not bool(found.any()):
            single = len(formula.clauses) < 2 and len(formula.terms) < 2
            known = read or not formula.vectors
            assert not (single and known) or state != "mixed", "a single term is decided where it can be"
    assert not text or said["mixed"]
    assert said["all"] or formula.vectors and not read


@pytest.mark.parametrize("text", ("j<=k", "i//4==j//5", "v0==v0", "j<=i & ", "j<i"))
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no term"):
        parse(text)


def test_what_a_formula_relates() -> None:
    assert not Formula().relates and not parse("v0[i] & v1[j] & j<5").relates
    assert parse("v0[i] | j<=i").relates and parse("v0[i]==v1[j]").relates
    assert parse("v3[i]==v1[j] & v1[i]").vectors == (1, 3)
