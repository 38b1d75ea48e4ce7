"""Comparisons of two values, as a formula over positions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.masks import truth
from autopar.masks.truth import Truth
from autopar.masks.values import Affine, Choice, Distance, Number, Quotient, Value, Vector, positions
from autopar.operators.predicates import OPPOSITE, Before, Bound, Chunk, Compare, Term, Within

aten = torch.ops.aten

RELATIONS: dict[Any, str] = {
    aten.eq: "==", aten.ne: "!=", aten.le: "<=", aten.ge: ">=", aten.lt: "<", aten.gt: ">",
    aten.less: "<", aten.less_equal: "<=", aten.greater: ">", aten.greater_equal: ">=", aten.not_equal: "!=",
}  # fmt: skip
_TURNED = {"==": "==", "!=": "!=", "<=": ">=", ">=": "<=", "<": ">", ">": "<"}  # the operands exchanged
_PYTHON: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def compared(
    relation: str, left: Value, right: Value, number_of: Callable[[Value], int], sizes: Mapping[str, int]
) -> Value | None:
    """``left relation right``; None where it is no formula, or one of a single position that a vector may hold.

    ``number_of`` numbers the vectors of a formula.
    """
    if isinstance(left, Distance) and isinstance(right, Number):
        return _distance(relation, left.difference, right, sizes)
    if isinstance(left, Number) and isinstance(right, Distance):
        return _distance(_TURNED[relation], right.difference, left, sizes)
    if isinstance(left, Quotient) and isinstance(right, Quotient) and relation in ("==", "!="):
        if {left.letter, right.letter} == {"i", "j"} and left.size == right.size:
            return _choice(truth.of(Chunk(left.size, relation == "==")))
        return None
    a, b = _affine(left), _affine(right)
    if a is not None and b is not None:
        return _sign(relation, a.plus(b, -1), sizes)
    sides = positions(left), positions(right)
    kinds = (Affine, Quotient, Vector)
    if not isinstance(left, kinds) or not isinstance(right, kinds):
        return None
    if sides == (frozenset("i"), frozenset("j")):
        return _choice(truth.of(Compare(number_of(left), relation, number_of(right))))
    if sides == (frozenset("j"), frozenset("i")):
        return _choice(truth.of(Compare(number_of(right), _TURNED[relation], number_of(left))))
    return None


def _choice(found: Truth) -> Choice:
    return Choice(found, True, False)


def _affine(value: Value) -> Affine | None:
    if isinstance(value, Number) and isinstance(value.number, int):
        return Affine((), int(value.number))
    return value if isinstance(value, Affine) else None


def _distance(relation: str, difference: Affine, number: Number, sizes: Mapping[str, int]) -> Value | None:
    """``|difference| < n`` is ``-n < difference < n``."""
    if relation in ("==", "!=") or not isinstance(number.number, int):
        return None
    inside = relation if relation in ("<", "<=") else OPPOSITE[relation]
    bound = Affine((), number.number)
    low = _sign(_TURNED[inside], difference.plus(bound), sizes)
    high = _sign(inside, difference.plus(bound, -1), sizes)
    if not isinstance(low, Choice) or not isinstance(high, Choice):
        return None
    found = truth.both(low.truth, high.truth)
    return _choice(found if inside == relation else truth.opposite(found))


def _sign(relation: str, difference: Affine, sizes: Mapping[str, int]) -> Value | None:
    """``difference relation 0``"""
    low, high = difference.bounds(sizes)
    known = {_PYTHON[relation](edge, 0) for edge in (low, high)}
    if low == high or (relation not in ("==", "!=") and len(known) == 1):
        return Number(known.pop()) if len(known) == 1 else None
    factors = dict(difference.factors)
    if any(abs(factor) != 1 for factor in factors.values()):
        return None
    first = next(iter(sorted(factors)))
    if factors[first] < 0:  # the smaller letter with a plus
        return _sign(_TURNED[relation], difference.times(-1), sizes)
    if factors == {"i": 1, "j": -1}:
        return _choice(_ordered(relation, difference.constant, Before, lambda number: Within(number)))
    if factors in ({"i": 1}, {"j": 1}):
        return _choice(
            _ordered(
                relation,
                difference.constant,
                lambda number: Bound("i" if first == "i" else "j", -number, below=False),
                lambda number: Bound("i" if first == "i" else "j", number),
            )
        )
    return None


def _ordered(relation: str, c: int, least: Callable[[int], Term], below: Callable[[int], Term]) -> Truth:
    """``x + c relation 0`` for integers: ``least(n)`` says x + n >= 0, ``below(n)`` says x < n."""
    match relation:
        case ">=":
            return truth.of(least(c))
        case ">":
            return truth.of(least(c - 1))
        case "<":
            return truth.of(below(-c))
        case "<=":
            return truth.of(below(1 - c))
        case "==":
            return truth.both(truth.of(least(c)), truth.of(below(1 - c)))
    return truth.either(truth.of(least(c - 1)), truth.of(below(-c)))
