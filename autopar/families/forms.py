"""Numbers of programs as expressions of the sizes of a batch, found from the numbers of a few programs.

A number is a constant, or a sum of at most two terms and a constant, each a rational multiple of a size or of a product
of two or three sizes: ``s``, ``b*s/4``, ``2*s - 1``. A float may also be the inverse of such a number (a mean). One
that no expression gives at every point is refused; so is a point set at which two expressions agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import sympy

from autopar.ir.size_conditions import Sizes as Sizes

Vector = tuple[Any, ...]  # one number, at each point
Column = tuple[int, ...]  # one term, at each point


class NoForm(Exception):
    """No expression gives these numbers at all points, or several do."""


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


class Terms:
    """The terms that a number may have, for points in the space of sizes.

    ``points``: at least three, of which the first is the one that is generalised. Sizes that never change are no terms.
    ``rounded``: the names of those that are made of others by rounding, with the names of these. One that is a multiple
    of its other at all points, but for a constant, is no term: so it is at all sizes in steps of theirs.
    """

    def __init__(self, points: Sequence[Sizes], rounded: Mapping[str, Collection[str]] | None = None) -> None:
        self.points, rounded = points, rounded or {}
        varying: list[str] = []
        for name in points[0]:
            column = [Fraction(point[name]) for point in points]
            others = [(symbol(other), tuple(point[other] for point in points)) for other in rounded.get(name, ())]
            if len(set(column)) > 1 and all(_solved(column, (other,)) is None for other in others):
                varying.append(name)
        of = {name: {*rounded.get(name, ()), name} for name in varying}
        most = 3 if len(points) > 4 else 2  # factors: of more terms, some fit a few points by chance
        names = [
            term
            for count in range(1, most + 1)
            for term in itertools.combinations(varying, count)
            if len(set[str]().union(*(of[name] for name in term))) == sum(len(of[name]) for name in term)
        ]
        self._spare = 1 + any(name in rounded for name in varying)  # points beyond those that solve for an expression
        self.columns: dict[sympy.Expr, Column] = {
            sympy.Mul(*map(symbol, term)): tuple(math.prod(point[name] for name in term) for point in points)
            for term in names
        }
        self._known: dict[Vector, Any] = {}

    def form(self, numbers: Vector) -> Any:
        """The number itself where it never changes, or the expression. Raises NoForm."""
        key = (*map(type, numbers), *numbers)
        if key not in self._known:
            self._known[key] = self._found(numbers)
        return self._known[key]

    def _found(self, numbers: Vector) -> Any:
        if len(set(map(repr, numbers))) == 1:
            return numbers[0]
        if all(type(number) is int for number in numbers):
            return self._of_integers([Fraction(number) for number in numbers])
        if all(type(number) is float and math.isfinite(number) and number for number in numbers):
            inverse = [1.0 / number for number in numbers]
            whole = [Fraction(round(number)) for number in inverse]
            if all(exact and float(1 / exact) == number for exact, number in zip(whole, numbers)):
                return 1 / self._of_integers(whole)
            if all(number == round(number) for number in numbers):
                return sympy.Float(1) * self._of_integers([Fraction(round(number)) for number in numbers])
        raise NoForm(f"{_listed(numbers)} is no multiple of a size")

    def _of_integers(self, numbers: Sequence[Fraction]) -> sympy.Expr:
        for count in (1, 2):
            if count + self._spare >= len(self.points):  # nothing would check the expression
                break
            fits = [
                found
                for terms in itertools.combinations(self.columns.items(), count)
                if (found := _solved(numbers, terms)) is not None
            ]
            if len(fits) > 1:
                raise NoForm(f"{_listed(numbers)} is {' as well as '.join(map(str, fits))}")
            if fits:
                return fits[0]
        raise NoForm(f"{_listed(numbers)} is no sum of two terms in the sizes")


def _solved(numbers: Sequence[Fraction], terms: Sequence[tuple[sympy.Expr, Column]]) -> sympy.Expr | None:
    """The combination of ``terms`` and a constant that gives all ``numbers``; None unless there is exactly one."""
    rows = [[Fraction(1), *(Fraction(column[i]) for _, column in terms)] for i in range(len(numbers))]
    factors = _eliminated(rows, list(numbers))
    if factors is None or not all(factors[1:]):  # a term that is not needed: fewer terms say it
        return None
    constant, *rest = [sympy.Rational(factor.numerator, factor.denominator) for factor in factors]
    return sympy.Add(constant, *(factor * term for factor, (term, _) in zip(rest, terms)))


def _eliminated(rows: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """The only solution of an overdetermined linear system, by exact elimination; None where there is none."""
    system = [[*row, value] for row, value in zip(rows, right)]
    unknowns = len(rows[0])
    for column in range(unknowns):
        pivot = next((i for i in range(column, len(system)) if system[i][column]), None)
        if pivot is None:
            return None
        system[column], system[pivot] = system[pivot], system[column]
        first = system[column][column]
        system[column] = [item / first for item in system[column]]
        for i, row in enumerate(system):
            if i != column and row[column]:
                factor = row[column]
                system[i] = [item - factor * lead for item, lead in zip(row, system[column])]
    if any(row[unknowns] for row in system[unknowns:]):
        return None
    return [system[i][unknowns] for i in range(unknowns)]


def _listed(numbers: Sequence[Any]) -> str:
    return "a number that is " + ", ".join(map(str, numbers))


class Evaluator:
    """Gives ``forms`` at any sizes: integers exactly, or None where one is no integer, or the inverse of 0, there."""

    def __init__(self, forms: Sequence[sympy.Expr], names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._forms = {form: _coefficients(form, self._names) for form in forms}

    def at(self, sizes: Sizes) -> dict[sympy.Expr, Any] | None:
        found: dict[sympy.Expr, Any] = {}
        values = [sizes[name] for name in self._names]
        for form, (terms, denominator, shape) in self._forms.items():
            total = sum(factor * math.prod(values[i] for i in term) for factor, term in terms)
            number, rest = divmod(total, denominator)
            if rest or (shape == "inverse" and not number):
                return None
            found[form] = number if shape is None else 1.0 / number if shape == "inverse" else float(number)
        return found


def _coefficients(form: sympy.Expr, names: Sequence[str]) -> tuple[list[tuple[int, tuple[int, ...]]], int, str | None]:
    """(terms as (factor, positions of sizes), common denominator, what is made of the sum)."""
    shape = None
    if form.has(sympy.Float):
        form, shape = sympy.nsimplify(form, rational=True), "float"
    elif not form.is_polynomial():
        form, shape = sympy.expand(1 / form), "inverse"
    polynomial = sympy.Poly(form, *map(symbol, names))
    denominator = math.lcm(*(int(factor.q) for _, factor in polynomial.terms()))
    terms = [
        (int(factor * denominator), tuple(i for i, power in enumerate(powers) for _ in range(power)))
        for powers, factor in polynomial.terms()
    ]
    return terms, denominator, shape


# ---------------------------------------------------------------- as data

KINDS = ("integer", "inverse", "float")
MOST_TERMS, LARGEST_FACTOR = 8, 1 << 48


def terms_of(form: sympy.Expr) -> list[Any]:
    """``form`` as JSON: what is made of the sum of its terms, then each term: numerator, denominator, sizes."""
    names = sorted(map(str, form.free_symbols))
    terms, denominator, shape = _coefficients(form, names)
    return [shape or KINDS[0], *([factor, denominator, *(names[i] for i in powers)] for factor, powers in terms)]


def form_of(data: Sequence[Any], names: Sequence[str]) -> sympy.Expr:
    """The inverse of :func:`terms_of`, of sizes with these ``names``. Raises ValueError for anything else."""
    kind, *terms = data
    if kind not in KINDS or not 0 < len(terms) <= MOST_TERMS:
        raise ValueError(f"no expression: {str(data):.100}")
    total = sympy.Integer(0)
    for factor, denominator, *sizes in terms:
        numbers = (factor, denominator)
        if not all(type(number) is int and abs(number) <= LARGEST_FACTOR for number in numbers) or denominator < 1:
            raise ValueError(f"no factor: {factor!r:.40} / {denominator!r:.40}")
        if len(sizes) > MOST_TERMS or any(size not in names for size in sizes):
            raise ValueError(f"no sizes of this family: {str(sizes):.100}")
        total += sympy.Rational(factor, denominator) * sympy.Mul(*map(symbol, sizes))
    if not total.free_symbols:
        raise ValueError(f"an expression that is a number: {total}")
    return total if kind == KINDS[0] else 1 / total if kind == KINDS[1] else sympy.Float(1) * total
