"""Numbers as expressions of sizes: those that there are, those that are refused, and their values elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from autopar.families.forms import Evaluator, NoForm, Terms, symbol

POINTS = [{"b": 4, "s": 28}, {"b": 4, "s": 40}, {"b": 8, "s": 12}, {"b": 12, "s": 60}]
b, s = symbol("b"), symbol("s")


def at_points(expression: Any) -> tuple[Any, ...]:
    return tuple(int(sympy.sympify(expression).subs({b: point["b"], s: point["s"]})) for point in POINTS)


@pytest.mark.parametrize(
    "expression",
    [7, s, b, b * s, s / 2, s - 1, 2 * s - 1, b * s / 4, 3 * b * s + 5, b * s - b, s + b, 64 * s + 3 * b * s],
    ids=str,
)
def test_every_form_of_a_program_is_found(expression: Any) -> None:
    found = Terms(POINTS).form(at_points(expression))
    assert sympy.simplify(found - expression) == 0


@pytest.mark.parametrize("numbers", [(28**2, 40**2, 144, 3600), (1, 2, 3, 5), (28, 40, 12, 61), (1, 1, 1, 2)], ids=str)
def test_no_form(numbers: tuple[int, ...]) -> None:
    with pytest.raises(NoForm):
        Terms(POINTS).form(numbers)


def test_two_forms_are_none() -> None:
    """Sizes in proportion: what is b may be s."""
    points = [{"b": 2, "s": 4}, {"b": 4, "s": 8}, {"b": 6, "s": 12}]
    with pytest.raises(NoForm, match="as well as"):
        Terms(points).form((4, 8, 12))


def test_few_points_give_simple_forms_only() -> None:
    points = [{"b": 2, "s": 4}, {"b": 4, "s": 10}, {"b": 8, "s": 6}]
    assert Terms(points).form((4, 10, 6)) == s
    with pytest.raises(NoForm):
        Terms(points).form((6, 14, 14))  # b + s would need a fourth point


def test_means_are_inverse_sizes() -> None:
    found = Terms(POINTS).form(tuple(1.0 / (point["b"] * point["s"]) for point in POINTS))
    values = Evaluator([found], ("b", "s")).at({"b": 8, "s": 33})
    assert values == {found: 1.0 / (8 * 33)}
    with pytest.raises(NoForm):
        Terms(POINTS).form((0.3, 0.4, 0.5, 0.6))


def test_there_is_no_mean_over_nothing() -> None:
    """The size of a call outside of the family: whether it could hold that is asked of every call."""
    found = Terms(POINTS).form(tuple(1.0 / (point["s"] - 1) for point in POINTS))
    evaluator = Evaluator([found], ("b", "s"))
    assert evaluator.at({"b": 4, "s": 1}) is None and evaluator.at({"b": 4, "s": 3}) == {found: 0.5}


def test_a_float_that_grows_stays_a_float() -> None:
    found = Terms(POINTS).form(tuple(float(point["s"]) for point in POINTS))
    (value,) = Evaluator([found], ("b", "s")).at({"b": 8, "s": 33}).values()  # type: ignore[union-attr]
    assert type(value) is float and value == 33.0


def test_values_are_whole_or_there_are_none() -> None:
    half = Terms(POINTS).form(at_points(s / 2))
    evaluator = Evaluator([half, s], ("b", "s"))
    assert evaluator.at({"b": 4, "s": 30}) == {half: 15, s: 30}
    assert evaluator.at({"b": 4, "s": 31}) is None
