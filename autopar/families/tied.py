"""Sizes of inputs that follow from others: labels one shorter, a target of twice the length, a mask of features.

In all calls such a size is the same expression of others, so that no program tells which of the two a number is of. It
is no size of a family then, but made of the others; a call in which it is something else is another family's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from autopar.families.sizes import BATCH, OTHER
from autopar.ir.size_conditions import Condition, Sizes, Tree, is_plain, names_in, put, rounded, rounded_parts, value_of

BEYOND = (0, 1, 2, 3, 5, 8, 63, 640)  # of a size that was seen: where a condition is tried as well
OTHERS = (-1, 1, 2, 3, 4, 6, 64)  # what another size is beside the one that is tied, in trials


def ties(points: Sequence[Sizes], conditions: Sequence[Condition]) -> dict[str, Tree]:
    """The sizes, by name, that are made of others at all ``points``, with what makes them.

    What ``conditions`` say that forward rounds is believed of two points. Two points are on a line always, so that a
    sum or a multiple of others is believed only where one of ``conditions`` holds for that and for nothing else.
    """
    found: dict[str, Tree] = {}
    if len(points) < 2:
        return found
    names = [name for name in points[0] if len({point[name] for point in points}) > 1]
    parts = rounded_parts(conditions)
    later_first = [*reversed(names)]
    for name in sorted(later_first, key=lambda name: name[0] != OTHER):
        others = [other for other in names if other != name and other not in found]
        tree = next(_candidates(name, others, parts, points, conditions), None) if name != BATCH else None
        if tree is None:
            continue
        tied = {**{other: put(made, {name: tree}) for other, made in found.items()}, name: tree}
        if all(is_plain(one.put(tied).tree) for one in conditions):
            found = tied
    return found


def never_one(tied: Mapping[str, Tree], sizes: Sizes) -> list[Condition]:
    """Conditions that those of ``tied`` are none of 0 and 1, or what they are at ``sizes``: torch asks that of none."""
    return [rounded(tree, sizes) for tree in tied.values() if not isinstance(tree, str)]


def _candidates(
    name: str, others: Sequence[str], parts: Sequence[Tree], points: Sequence[Sizes], conditions: Sequence[Condition]
) -> Iterator[Tree]:
    for other in others:
        if other != BATCH and all(point[name] == point[other] for point in points):
            yield other
    for part in parts:
        if names_in(part) <= set(others) and all(value_of(part, point) == point[name] for point in points):
            yield part
    told = [one.tree for one in conditions if name in one.names and _is_equality(one.tree)]
    factors = [*others, BATCH] if BATCH in points[0] and BATCH not in others else others
    products: list[Tree] = [("mul", *pair) for pair in itertools.combinations_with_replacement(factors, 2)]
    for base in (*products, *others) if told else ():
        tree = _on_a_line(name, base, points)
        if tree is not None and any(_pins(question, name, tree, points[0]) for question in told):
            yield tree


def _is_equality(tree: Tree) -> bool:
    return isinstance(tree, tuple) and tree[0] == "eq"


def _on_a_line(name: str, base: Tree, points: Sequence[Sizes]) -> Tree | None:
    """``factor * base + rest``, in whole numbers, at all points; None where it is not."""
    pairs = [(int(value_of(base, point)), point[name]) for point in points]
    (x, y), (there, high) = pairs[0], next((pair for pair in pairs if pair[0] != pairs[0][0]), pairs[0])
    if there == x:
        return None
    factor = Fraction(high - y, there - x)
    rest = y - factor * x
    if factor.denominator != 1 or factor < 1 or any(factor * at + rest != size for at, size in pairs):
        return None
    tree: Tree = ("mul", int(factor), base) if factor != 1 else base
    return ("add", int(rest), tree) if rest else tree


def _pins(question: Tree, name: str, tree: Tree, like: Sizes) -> bool:
    """Whether the answer is yes where the size ``name`` is ``tree``, and no where it is not."""

    def answers(more: int) -> Iterator[bool]:
        of = sorted(names_in(tree))
        for beyond in itertools.product(BEYOND, repeat=len(of)):
            sizes = {**like, **{other: like[other] + more_of for other, more_of in zip(of, beyond)}}
            yield Condition(question).holds({**sizes, name: int(value_of(tree, sizes)) + more})

    is_about_both = names_in(tree) <= Condition(question).names
    return is_about_both and all(answers(0)) and not any(any(answers(other)) for other in OTHERS)
