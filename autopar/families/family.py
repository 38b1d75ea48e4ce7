"""A family of programs: one program whose numbers are expressions of sizes, and for which sizes it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.families.constants import Beginning, beginning
from autopar.families.forms import Evaluator, NoForm, Sizes, Terms, symbol
from autopar.families.sizes import Range, Scheme
from autopar.families.walk import Walk, constants_of, evaluated, in_order, numbers_of, unequal_segments
from autopar.ir.fingerprint import CallFacts
from autopar.ir.program import AnyProgram
from autopar.ir.size_conditions import Condition, Tree, names_in, text_of
from autopar.ir.sizes import is_expression


@dataclass(frozen=True)
class Point:
    """A program that was compiled for ``sizes``."""

    sizes: Sizes
    program: AnyProgram


class Family:
    """Programs that are the same but for numbers, each of which is an expression of the sizes of a batch.

    Attributes:
        template: the program with expressions (sympy) in place of the numbers that change.
        ranges: by size, for which values it holds: those between the least and the most that were compiled, in steps
            of the greatest common divisor of their differences. That all between behave alike is the assumption.
        points: the sizes that were compiled.
        forms: the expressions.
        constants: by place in the program, those that change.
        scheme: which dims of a call are these sizes.
        regions: the sizes at which the model does the same: those where all conditions of one of these hold, which are
            what it asked about sizes, and was answered, at one of the points.
    """

    def __init__(
        self,
        template: AnyProgram,
        ranges: Mapping[str, Range],
        points: Sequence[Sizes],
        forms: Sequence[sympy.Expr],
        constants: Mapping[str, Beginning],
        scheme: Scheme | None = None,
        regions: Iterable[Sequence[Condition]] = ((),),
    ) -> None:
        self.template, self.ranges, self.points = template, dict(ranges), tuple(points)
        self.forms, self.constants, self.scheme = tuple(forms), constants, scheme
        self.regions = tuple(tuple(dict.fromkeys(region)) for region in regions)
        self._evaluator = Evaluator(self.forms, (*ranges, *self.rounded))
        self._unequal = unequal_segments(template)

    @property
    def rounded(self) -> Mapping[str, Tree]:
        """The sizes that the model makes of the others by rounding, by their texts."""
        return self.scheme.rounded if self.scheme is not None else {}

    def __contains__(self, sizes: Sizes) -> bool:
        return self.numbers(sizes) is not None

    def numbers(self, sizes: Sizes) -> dict[sympy.Expr, Any] | None:
        """The value of each of :attr:`forms`, and of each size, at ``sizes``; None where the family does not hold."""
        if sizes.keys() != self.ranges.keys():
            return None
        if not all(self.ranges[name].holds(value) for name, value in sizes.items()) or not self.is_alike(sizes):
            return None
        found = self._at(sizes)
        return None if found is None else found | {symbol(name): value for name, value in self._all(sizes).items()}

    def is_alike(self, sizes: Sizes) -> bool:
        """Whether what the model asks about sizes is answered at ``sizes`` as it was at one of the points."""
        return any(all(condition.holds(sizes) for condition in region) for region in self.regions)

    def _at(self, sizes: Sizes) -> dict[sympy.Expr, Any] | None:
        """As :meth:`numbers`, inside or outside of the ranges."""
        found = self._evaluator.at(self._all(sizes))
        if found is None or any(len({found.get(part, part) for part in parts}) == 1 for parts in self._unequal):
            return None
        return found

    def _all(self, sizes: Sizes) -> Sizes:
        return sizes if self.scheme is None else self.scheme.completed(sizes)

    def member(self, sizes: Sizes, call: CallFacts | None = None) -> AnyProgram:
        """The program for ``sizes``, which must be in the family. Decisions and their costs are the first point's.

        ``call``: what is known of the call that the program is for, which goes into its fingerprint.
        """
        numbers = self.numbers(sizes)
        assert numbers is not None, f"{sizes} is outside of {self}"

        def constant(place: str, tensor: Tensor) -> Tensor:
            return self.constants[place].of(numbers) if place in self.constants else tensor

        found = self._put(numbers, constant)
        known = replace(found.fingerprint, call=call) if found.fingerprint is not None and call is not None else None
        object.__setattr__(found, "fingerprint", known)  # not dataclasses.replace, which would make all graphs
        return found

    def _put(self, numbers: Mapping[Any, Any], constant: Callable[[str, Tensor], Tensor]) -> AnyProgram:
        """The template with ``numbers`` in the places of expressions, and ``constant`` of each constant."""

        def number(given: Any) -> Any:
            return given if type(given) is int or type(given) is float else numbers[given]

        return evaluated(self.template, number, constant)

    @property
    def first_program(self) -> AnyProgram:
        """The member that was compiled first, with its fingerprint."""
        return self.member(self.points[0], self._first_call)

    @property
    def _first_call(self) -> CallFacts | None:
        return self.template.fingerprint.call if self.template.fingerprint is not None else None

    def called(self, in_spec: pytree.TreeSpec) -> Family:
        """This family for calls whose arguments have the structure ``in_spec``."""
        template = replace(self.template, in_spec=in_spec)
        return Family(template, self.ranges, self.points, self.forms, self.constants, self.scheme, self.regions)

    def within(self, asked: Sequence[Condition]) -> Family:
        """This one, for sizes at which what the model asks is answered as it was, ``asked``, at all of the points."""
        return Family(self.template, self.ranges, self.points, self.forms, self.constants, self.scheme, (asked,))

    def with_longest_constants(self) -> AnyProgram:
        """:attr:`template` with the longest of each constant that changes, which those of members begin."""
        longest = {place: known.longest for place, known in self.constants.items()}
        walk = Walk(lambda number: number, constants=lambda place, tensor: longest.get(place, tensor))
        return walk.program(self.template)

    def could_hold(self, sizes: Sizes) -> bool:
        """Whether all numbers are whole at ``sizes``, inside or outside of the ranges; a size that all share stays."""
        if any(known.step == 0 and sizes.get(name) != known.first for name, known in self.ranges.items()):
            return False
        return sizes.keys() == self.ranges.keys() and self.is_alike(sizes) and self._at(sizes) is not None

    def agrees(self, program: AnyProgram, sizes: Sizes) -> bool:
        """Whether ``program``, compiled for ``sizes`` inside or outside of the ranges, is what the family says."""
        numbers = self._at(sizes) if sizes.keys() == self.ranges.keys() else None
        if numbers is None:
            return False
        read, skeleton = numbers_of(program)
        expected, own = numbers_of(self.template)
        if skeleton != own:  # one of them was read from a file, which keeps what runs
            if str(self._put(numbers, lambda place, tensor: tensor)) != str(program):
                return False
        elif read != [numbers.get(each, each) if is_expression(each) else each for each in expected]:
            return False
        constants = constants_of(program)
        return all(
            _equal(constants[place], tensor)
            for place, tensor in constants_of(self.template).items()
            if place not in self.constants and place in constants
        )

    def extended(self, program: AnyProgram, sizes: Sizes, asked: Sequence[Condition] = ()) -> Family | None:
        """The family that holds for ``sizes`` too, of which ``program`` is the program; None where it is no member.

        ``asked``: what the model asks there, where that is not :meth:`alike <is_alike>`.
        """
        if not self.agrees(program, sizes):
            return None
        points = [*self.points, sizes]
        try:
            constants = self._longer_constants(program, sizes)
        except NoForm:
            return None
        ranges = {name: Range.of([point[name] for point in points]) for name in self.ranges}
        regions = self.regions if self.is_alike(sizes) else (*self.regions, tuple(asked))
        return Family(self.template, ranges, points, self.forms, constants, self.scheme, regions)

    def _longer_constants(self, program: AnyProgram, sizes: Sizes) -> dict[str, Beginning]:
        """The constants that change, with those of ``program``, which may be longer."""
        here = constants_of(program)
        return {
            place: known.joined(here[place], place) if place in here else known
            for place, known in self.constants.items()
        }

    @property
    def exceptions(self) -> str:
        """What has to hold for sizes in the ranges, in words; "" where nothing is left out that was tried."""
        values = {name: each.values for name, each in self.ranges.items()}
        told = [" and ".join(str(one) for one in region if one.excludes(values)) for region in self.regions]
        return " or ".join(dict.fromkeys(told)) if all(told) else ""

    def __str__(self) -> str:
        told = [f"{name} = {each}" for name, each in self.ranges.items()]
        tied = self.scheme.tied if self.scheme is not None else {}
        told += [f"{name} = {text_of(part)}" for name, part in tied.items()]
        return "; ".join([*told, self.exceptions] if self.exceptions else told)


def fit(points: Sequence[Point], scheme: Scheme | None = None) -> Family:
    """The family of ``points`` (at least three), the first of which gives decisions and plan.

    Raises NoForm, with a reason, where they are not one.
    """
    read = [numbers_of(point.program) for point in points]
    for point, (_, skeleton) in zip(points, read):
        if skeleton != read[0][1]:
            here, there = _text(point.sizes), _text(points[0].sizes)
            raise NoForm(f"the program for {here} has other operators than that for {there}")
    rounded = {} if scheme is None else scheme.rounded
    sizes = [point.sizes if scheme is None else scheme.completed(point.sizes) for point in points]
    terms = Terms(sizes, {text: names_in(part) for text, part in rounded.items()})
    numbers = [terms.form(vector) for vector in zip(*(numbers for numbers, _ in read), strict=True)]
    template = in_order(points[0].program, numbers)
    forms = {number: None for number in numbers if not isinstance(number, int | float)}
    constants = _constants(points, terms)
    forms |= {size: None for one in constants.values() for size in one.shape if not isinstance(size, int)}
    ranges = {name: Range.of([point.sizes[name] for point in points]) for name in points[0].sizes}
    family = Family(template, ranges, [point.sizes for point in points], list(forms), constants, scheme)
    for point in points:  # the arithmetic of the evaluator is that of the fit
        assert point.sizes in family, f"{point.sizes} is not in the family of {family}"
    return family


def _constants(points: Sequence[Point], terms: Terms) -> dict[str, Beginning]:
    """Those that change, by place."""
    everywhere = [constants_of(point.program) for point in points]
    found = {}
    for place, first in everywhere[0].items():
        tensors = [constants[place] for constants in everywhere]
        if any(tensor is not first and not _equal(tensor, first) for tensor in tensors):
            found[place] = beginning(place, tensors, terms)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.eq(other) | (one.ne(one) & other.ne(other))).all())


def _text(sizes: Sizes) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())
