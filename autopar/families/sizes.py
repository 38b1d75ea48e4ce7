"""The sizes by which calls of one kind differ: which dims of the inputs they are, and which others are worth a compile.

Dims that have been equal in all calls so far are one size: ``b`` of the batch, ``s`` of the sequence. Dims that never
changed are none, but for the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autopar.families.forms import Sizes
from autopar.ir.size_conditions import Tree, value_of

Shapes = tuple[tuple[int, ...], ...]  # of the tensors of a call
Place = tuple[int, int]  # (tensor, dim)
BATCH, SEQUENCE, OTHER = "b", "s", "n"
LARGEST_STEP = 64  # lengths that are multiples of more are compared as multiples of this
HIGHER = 8  # multiples of that are tried
LEAST_STEP = 8  # of two lengths that have less in common, others may have nothing
MOST_STEPS = 1024  # that are tried, to find a size for which a model does the same
SHORTEST = 3  # 1 and 2 have programs of their own: a dim that broadcasts, a shift that leaves one label


@dataclass(frozen=True)
class Range:
    """The values of one size that a family was seen to hold for: ``first``, and steps of ``step`` from it."""

    least: int
    most: int
    first: int
    step: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Range:
        return cls(min(values), max(values), values[0], math.gcd(*(value - values[0] for value in values)))

    def holds(self, value: int) -> bool:
        return self.least <= value <= self.most and (value - self.first) % max(self.step, 1) == 0

    @property
    def values(self) -> range:
        """All of them."""
        step = max(self.step, 1)
        return range(self.first - (self.first - self.least) // step * step, self.most + 1, step)

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        rest = self.first % self.step
        steps = "" if self.step == 1 else f", multiples of {self.step}" + (f" plus {rest}" if rest else "")
        return f"{self.least} to {self.most}{steps}"


@dataclass(frozen=True)
class Scheme:
    """The sizes of some calls.

    Attributes:
        names: place -> the name of its size.
        fixed: place -> its value in every call.
        rounded: sizes that the model makes of these by rounding, ``(s - 5)//3``, by their texts.
        tied: those of ``names`` that are made of the others in every call, as :func:`autopar.families.tied.ties` says.
    """

    names: Mapping[Place, str]
    fixed: Mapping[Place, int]
    rounded: Mapping[str, Tree] = field(default_factory=dict)
    tied: Mapping[str, Tree] = field(default_factory=dict)

    def completed(self, sizes: Sizes) -> Sizes:
        """``sizes``, and those that are made of them."""
        if not self.rounded:
            return sizes
        return {**sizes, **{text: int(value_of(part, sizes)) for text, part in self.rounded.items()}}

    @classmethod
    def of(cls, calls: Sequence[Shapes], roles: Mapping[Place, str]) -> Scheme:
        """``roles``: the places of batch and sequence dims -> BATCH, SEQUENCE."""
        names: dict[Place, str] = {}
        fixed: dict[Place, int] = {}
        known: dict[tuple[str, tuple[int, ...]], str] = {}
        for place in places(calls[0]):
            tensor, dim = place
            seen = tuple(shapes[tensor][dim] for shapes in calls)
            role = roles.get(place, OTHER)
            if len(set(seen)) == 1 and role != BATCH:
                fixed[place] = seen[0]
                continue
            if (role, seen) not in known:
                count = sum(other == role for other, _ in known)
                known[role, seen] = role + (str(count + 1) if count else "")
            names[place] = known[role, seen]
        return cls(names, fixed)

    def fits(self, shapes: Shapes) -> bool:
        """Whether there are tensors of these numbers of dims."""
        return set(places(shapes)) == {*self.names, *self.fixed}

    def sizes(self, shapes: Shapes) -> Sizes | None:
        """Those of a call; None where it is none of these."""
        if any(shapes[tensor][dim] != size for (tensor, dim), size in self.fixed.items()):
            return None
        found: dict[str, int] = {}
        for (tensor, dim), name in self.names.items():
            size = shapes[tensor][dim]
            if found.setdefault(name, size) != size:
                return None
        free = self.free(found)
        return free if self.of_inputs(free) == found else None

    def free(self, sizes: Sizes) -> Sizes:
        """Those of ``sizes`` that are not tied to others."""
        return {name: size for name, size in sizes.items() if name not in self.tied}

    def of_inputs(self, sizes: Sizes) -> Sizes:
        """``sizes``, and those that are tied to them."""
        return {**sizes, **{name: value_of(part, sizes) for name, part in self.tied.items()}} if self.tied else sizes

    def shapes(self, like: Shapes, sizes: Sizes) -> Shapes:
        """The shapes of a call like one of these, of other ``sizes``."""
        sizes = self.of_inputs(sizes)
        return tuple(
            tuple(
                sizes[self.names[tensor, dim]] if (tensor, dim) in self.names else size
                for dim, size in enumerate(shape)
            )
            for tensor, shape in enumerate(like)
        )


def places(shapes: Shapes) -> Iterator[Place]:
    for tensor, shape in enumerate(shapes):
        for dim in range(len(shape)):
            yield tensor, dim


def further(
    points: Sequence[Sizes], unit: Mapping[str, int], varies_batch: bool,
    is_alike: Callable[[Sizes], bool] = lambda sizes: True,
) -> list[Sizes]:  # fmt: skip
    """At most two more points for at least two ``points`` of a family: one of greater sizes, one of smaller ones.

    ``unit``: what a size is a multiple of, at least. ``is_alike``: whether a model does there what it does at
    ``points``, as far as is known: the next sizes of which it does are taken. Numbers of a program that depend
    on two sizes can be told from those that depend on one, since the sizes of the four are not in proportion.
    """
    high, low = dict(points[0]), dict(points[0])
    steps: dict[str, int] = {}
    for name in points[0]:
        values = [point[name] for point in points]
        if name.startswith(BATCH):
            if varies_batch and values[0] > unit[name]:  # one row on each rank has a program of its own
                high[name], low[name] = values[0] + 2 * unit[name], values[0] + unit[name]
            continue
        if len(set(values)) == 1:
            continue
        step = _step(values, unit[name])
        high[name], low[name] = _ends(values, step, unit[name])
        steps[name] = step
    known, found = [dict(point) for point in points], list[Sizes]()

    def is_other(tried: Sizes) -> bool:
        return tried not in known and is_alike(tried)

    def tells(tried: Sizes) -> bool:
        """Whether all differ by ``steps`` then, and by no multiple of them, with a second one."""
        gaps = {name: [point[name] - tried[name] for point in known] for name in steps}
        return is_other(tried) and all(math.gcd(*gaps[name]) <= step for name, step in steps.items())

    for sizes in (high, low):
        other = sizes if is_other(sizes) else next_alike(sizes, steps, tells) or next_alike(sizes, steps, is_other)
        if other is not None:
            found.append(other)
            known.append(dict(other))
    return found


def between(points: Sequence[Sizes], unit: Mapping[str, int], is_alike: Callable[[Sizes], bool]) -> list[Sizes]:
    """At most two more points, next to the first of ``points``: what is rounded is seen at other remainders there."""
    steps = {name: _step([point[name] for point in points], unit[name]) for name in points[0] if name[0] != BATCH}
    varying = [name for name in steps if len({point[name] for point in points}) > 1]
    found: list[Sizes] = []
    for count in (1, 2):
        tried = {name: size + count * steps[name] if name in varying else size for name, size in points[0].items()}
        if tried not in (*points, *found) and is_alike(tried):
            found.append(tried)
    return found


def in_steps(points: Sequence[Sizes], unit: Mapping[str, int]) -> dict[str, int]:
    """``unit``, and where all ``points`` are in larger steps, these: images whose heights are all even."""
    common = {name: math.gcd(*(point[name] for point in points)) for name in points[0] if not name.startswith(BATCH)}
    return {name: math.lcm(size, math.gcd(common.get(name, 1), LARGEST_STEP)) for name, size in unit.items()}


def _step(values: Sequence[int], unit: int) -> int:
    """In what steps sizes like ``values`` come."""
    step = math.gcd(math.lcm(LARGEST_STEP, unit), *values)
    return step if step >= LEAST_STEP * unit else unit


def next_alike(sizes: Sizes, steps: Mapping[str, int], is_alike: Callable[[Sizes], bool]) -> Sizes | None:
    """The first of ``sizes`` and those ``steps`` above that are alike, or the first below; None if none is near."""
    for count in (*range(MOST_STEPS), *range(-1, -MOST_STEPS, -1)):
        tried = {name: size + count * steps.get(name, 0) for name, size in sizes.items()}
        if (count >= 0 or all(tried[name] >= SHORTEST for name in steps)) and is_alike(tried):
            return tried
    return None


def _ends(values: Sequence[int], step: int, unit: int) -> tuple[int, int]:
    """A greater and a smaller length than ``values``.

    All of them differ by ``step`` and no multiple of it, so that they say something of all its multiples. The greatest
    gives way to that first: short batches come, and batches of more than twice the longest do not.
    """
    high, low = _above(2 * max(values), values[0], step, unit), _below(min(values), step)
    for least in range(low, min(low + 2 * step, min(values)) + 1, step):
        for most in range(high, high + HIGHER * math.lcm(step, LARGEST_STEP, unit), math.lcm(step, LARGEST_STEP, unit)):
            if math.gcd(*(value - values[0] for value in (*values, most, least))) <= step:
                return most, least
    return high, low


def _above(wanted: int, first: int, step: int, unit: int) -> int:
    """The first of ``first``, ``first + step``, ... from ``wanted`` on; a multiple of many, where one is near.

    What asks whether a length is a multiple of a power of two then gets another answer than for other lengths.
    """
    at_least = first + -(-(wanted - first) // step) * step
    many = math.lcm(LARGEST_STEP, unit)
    for tries in range(many):
        if (at_least + tries * step) % many == 0:
            return at_least + tries * step
    return at_least


def _below(least: int, step: int) -> int:
    """The smallest from ``SHORTEST`` on that is a number of ``step`` away."""
    return least - max((least - SHORTEST) // step, 0) * step


def reaching(
    sizes: Sizes, ranges: Mapping[str, Range], is_alike: Callable[[Sizes], bool] = lambda sizes: True
) -> Sizes:
    """``sizes``, of which those outside of their range are further outside; ``is_alike`` as of :func:`further`.

    A family that grows by one compile then grows by more than one length.
    """
    found, steps = dict(sizes), dict[str, int]()
    for name, known in ranges.items():
        step, size = max(known.step, 1), sizes[name]
        if (size - known.first) % step:
            continue
        if name.startswith(BATCH):
            found[name] = size if size <= known.most else known.first + -(-(2 * size - known.first) // step) * step
        elif size > known.most:
            found[name], steps[name] = _above(2 * size, known.first, step, 1), step
        elif size < known.least:
            found[name], steps[name] = _below(size, step), step
    return next_alike(found, steps, is_alike) or dict(sizes)
