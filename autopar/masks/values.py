"""What one element of a tensor is, as a function of the row i, the column j, and the further dims of an attention mask.

The letters of dims: ``i`` the row, ``j`` the column, ``d3`` the head, ``d4``, ... the batch (counted from the right).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from autopar.masks.truth import Truth
from autopar.operators.predicates import Compare

Plain: TypeAlias = bool | int | float


@dataclass(frozen=True)
class Affine:
    """An integer: the sum of letters times their factors, plus a constant. The indices of dims are of this kind."""

    factors: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(factors: Mapping[str, int], constant: int) -> Affine:
        return Affine(tuple(sorted((letter, factor) for letter, factor in factors.items() if factor)), constant)

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        factors = dict(self.factors)
        for letter, factor in other.factors:
            factors[letter] = factors.get(letter, 0) + sign * factor
        return Affine.of(factors, self.constant + sign * other.constant)

    def times(self, number: int) -> Affine:
        return Affine.of({letter: factor * number for letter, factor in self.factors}, self.constant * number)

    def bounds(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """The least and the largest value, where each letter is below its size."""
        ends = [(factor * (sizes[letter] - 1), 0) for letter, factor in self.factors]
        return self.constant + sum(map(min, ends)), self.constant + sum(map(max, ends))


ZERO = Affine()


@dataclass(frozen=True)
class Number:
    """The same number everywhere."""

    number: Plain


@dataclass(frozen=True)
class Quotient:
    """``letter // size``"""

    letter: str
    size: int


@dataclass(frozen=True)
class Distance:
    """``|difference|``"""

    difference: Affine


@dataclass(frozen=True)
class Leaf:
    """The element of a node's tensor at an index, whatever the node computes."""

    node: fx.Node
    index: tuple[Affine, ...]

    @property
    def letters(self) -> frozenset[str]:
        return frozenset(letter for entry in self.index for letter, _ in entry.factors)


@dataclass(frozen=True)
class Applied:
    """A pointwise operator, that of ``node``, applied to other values than the node's (spread) operands."""

    node: fx.Node
    operands: tuple[Value, ...]

    @property
    def letters(self) -> frozenset[str]:
        return frozenset().union(*map(letters_of, self.operands))


@dataclass(frozen=True)
class Vector:
    """A value of any kind that depends on one of i and j at most."""

    source: Leaf | Applied
    boolean: bool


@dataclass(frozen=True)
class Choice:
    """``yes`` where ``truth`` holds, else ``no``. The vectors of its terms are numbers of a reading."""

    truth: Truth
    yes: Plain
    no: Plain


@dataclass(frozen=True)
class Bias:
    """A floating-point tensor as it is, aligned with the scores."""

    node: fx.Node


@dataclass(frozen=True)
class Masked:
    """The bias where ``truth`` holds, else the number ``hidden``."""

    bias: Bias
    truth: Truth
    hidden: Plain


Value: TypeAlias = Number | Affine | Quotient | Distance | Vector | Choice | Bias | Masked


def letters_of(value: Value) -> frozenset[str]:
    """The letters on which a value depends. Vectors in a choice depend on the batch too: ``b`` stands for that."""
    match value:
        case Number():
            return frozenset()
        case Affine(factors):
            return frozenset(letter for letter, _ in factors)
        case Quotient(letter):
            return frozenset(letter)
        case Distance(difference):
            return letters_of(difference)
        case Vector(source):
            return source.letters
        case Choice(truth):
            return frozenset().union(*(_letters_of_terms(clause) for clause in truth))
    return frozenset("ij")


def _letters_of_terms(clause: frozenset[object]) -> frozenset[str]:
    found: set[str] = set()
    for term in clause:
        letter = getattr(term, "letter", None)
        found |= {letter} if letter else set("ij")
        found |= {"b"} if isinstance(term, Compare) or hasattr(term, "vector") else set()
    return frozenset(found)


def positions(value: Value) -> frozenset[str]:
    """Those of i and j on which it depends."""
    return letters_of(value) & frozenset("ij")


def along(vector: Value, letter: str) -> Value:
    """The same vector, counted along another letter than i or j."""

    def turned(entry: Affine) -> Affine:
        return Affine.of({letter if name in ("i", "j") else name: f for name, f in entry.factors}, entry.constant)

    match vector:
        case Vector(Leaf(node, index), boolean):
            return Vector(Leaf(node, tuple(map(turned, index))), boolean)
        case Vector(Applied(node, operands), boolean):
            return Vector(Applied(node, tuple(along(operand, letter) for operand in operands)), boolean)
        case Quotient(_, size):
            return Quotient(letter, size)
    return turned(vector) if isinstance(vector, Affine) else vector
