"""Dims as digits of the numbers of a token, of an expert and of a choice: where a layer of experts has them.

A token has a number from 0 on, an expert too, and so have the choices of one token (its first expert, its second
one). A dim of a tensor counts some digits of these numbers: of a tensor of (batch * sequence, experts) the first dim
is the token and the second one the expert; of (experts * tokens, width) the first dim is both, the expert outermost.
Each operator's splitting rule says how the dims of its operands and results belong together, so digits are followed
through any operator that has a rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from autopar.rules.factoring import Call, Dims, Factoring, Shape


@dataclass(frozen=True)
class Digit:
    """``number // stride % size`` of the number of an ``of``; elements of a dim that is none of these are ``OTHER``."""

    of: str
    size: int
    stride: int = 1


TOKEN, EXPERT, CHOICE, OTHER = "token", "expert", "choice", "other"
Place = tuple[Digit, ...]  # one dim, the outermost digit first; () for a dim of size 1
Places = tuple[Place, ...]  # the dims of a tensor


class Unaligned(Exception):
    """Digits that a rule cannot carry, and why. ``node``: the operator where this is."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node

    def at(self, node: fx.Node) -> Unaligned:
        """The same at ``node``, if no place is known yet."""
        return self if self.node is not None else Unaligned(self.reason, node)


def has(places: Places, of: str) -> bool:
    return any(digit.of == of for place in places for digit in place)


def size_of(place: Iterable[Digit], *of: str) -> int:
    """How many numbers the digits count; only those of some kinds if these are given."""
    return math.prod(digit.size for digit in place if not of or digit.of in of)


def joined(digits: Iterable[Digit]) -> Place:
    """Digits with neighbours as one, where they are neighbours in the number too."""
    found: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        last = found[-1] if found else None
        if last and last.of == digit.of and (digit.of == OTHER or last.stride == digit.stride * digit.size):
            found[-1] = Digit(digit.of, last.size * digit.size, digit.stride)
        else:
            found.append(digit)
    return tuple(found)


def counted(of: str, sizes: Sequence[int]) -> list[Place]:
    """The digits of one number that several dims count together, the first outermost."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [joined([Digit(of, size, stride)]) for size, stride in zip(sizes, strides)]


@dataclass(frozen=True)
class Located:
    """One call of an operator, and the digits of those factors of its rule that are known."""

    call: Call
    factoring: Factoring
    found: Mapping[str, Place]

    @classmethod
    def by(cls, call: Call, factoring: Factoring, known: Iterable[tuple[Dims, Places]]) -> Located:
        """From the places of some of its tensors.

        Raises Unaligned where they do not fit, or where tokens, experts or choices are not treated each alone.
        """
        found: dict[str, Place] = {}
        for dims, places in known:
            for factors, place in zip(dims, places):
                for factor, digits in _shared(factoring, factors, place).items():
                    if factor in factoring.whole:
                        if any(digit.of != OTHER for digit in digits):
                            raise Unaligned(f"{digits[0].of}s are not treated each alone")
                    elif found.setdefault(factor, digits) != digits:
                        raise Unaligned("it combines different tokens or experts")
        return cls(call, factoring, found)

    def operand(self, number: int) -> Places:
        """The places of an operand. Raises Unaligned."""
        return self._places(self.factoring.inputs[number], self.call.inputs[number])

    def result(self, number: int = 0) -> Places:
        """The places of a result. Raises Unaligned."""
        return self._places(self.factoring.outputs[number], self.call.outputs[number])

    def _places(self, dims: Dims, shape: Shape) -> Places:
        """Factors that are not found are other elements."""
        places = []
        for factors, size in zip(dims, shape):
            digits = [digit for name in factors for digit in self.found.get(name, (self._other(name, factors, size),))]
            places.append(joined(digits))
            if size_of(digits) != size:
                raise Unaligned("its sizes do not say which elements belong together")
        return tuple(places)

    def _other(self, name: str, factors: tuple[str, ...], size: int) -> Digit:
        # the table of sizes does not tell that of a factor which is never split
        return Digit(OTHER, size if len(factors) == 1 else self.factoring.sizes[name])

    @cached_property
    def others(self) -> dict[str, int]:
        """How many other elements each factor counts."""
        sizes: dict[str, int] = {}
        factoring, call = self.factoring, self.call
        for dims, shape in zip((*factoring.inputs, *factoring.outputs), (*call.inputs, *call.outputs)):
            for factors, size in zip(dims, shape):
                for name in factors:
                    sizes[name] = size_of(self.found.get(name, (self._other(name, factors, size),)), OTHER)
        return sizes

    def further(self, dims: Dims) -> list[str]:
        """The factors of one tensor that count other elements, in order."""
        return [name for factors in dims for name in factors if self.others[name] > 1]

    @property
    def gone(self) -> list[Digit]:
        """The digits that no result has."""
        kept = {name for dims in self.factoring.outputs for factors in dims for name in factors}
        return [digit for name, place in self.found.items() if name not in kept for digit in place]


_MIXED = "a reshape mixes tokens, experts and other elements"


def _shared(factoring: Factoring, factors: tuple[str, ...], place: Place) -> dict[str, Place]:
    """The digits of each factor of one dim."""
    if len(factors) == 1:
        return {factors[0]: place}
    rest, found = list(reversed(place)), {}
    for factor in factors:
        digits, missing = [], factoring.sizes[factor]
        while missing > 1:
            if not rest:
                raise Unaligned(_MIXED)
            digit = rest.pop()
            size = math.gcd(digit.size, missing)
            if size < digit.size:
                if size < missing:
                    raise Unaligned(_MIXED)
                rest.append(Digit(digit.of, digit.size // size, digit.stride))
            digits.append(Digit(digit.of, size, digit.stride * (digit.size // size)))
            missing //= size
        found[factor] = joined(digits)
    if rest:
        raise Unaligned(_MIXED)
    return found
