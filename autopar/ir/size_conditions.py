"""What the Python of a model has asked about the sizes of a batch: conditions that a family keeps to.

Programs of a few sizes show whether the model asked whether a length is a multiple of a power of two, or greater than
some number; they do not show ``length % 3 == 0`` where none of them is. So each question that was answered is kept with
its answer, as an expression of the sizes: another size is in the family only if all answers are the same.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

Sizes = Mapping[str, int]  # name of a size -> its value
Dims = Sequence[Sequence[str | int]]  # of each tensor of a call, of each dim its size, or the name of it

Tree = int | float | str | tuple[Any, ...]  # a number, the name of a size, or (operation, tree, ...)

MOST_PARTS = 200  # of one condition
MOST_TRIED = 4096  # sizes, to say whether a condition leaves any out
_FOLDED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {  # of two or more
    "add": (operator.add, " + "),
    "mul": (operator.mul, "*"),
    "and": (lambda one, other: one and other, " and "),
    "or": (lambda one, other: one or other, " or "),
    "min": (min, "min"),
    "max": (max, "max"),
}
_BINARY: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "floordiv": (operator.floordiv, "//"),
    "truediv": (operator.truediv, "/"),
    "mod": (operator.mod, " % "),
    "bitand": (operator.and_, " & "),
    "bitor": (operator.or_, " | "),
    "eq": (operator.eq, " == "),
    "ne": (operator.ne, " != "),
    "lt": (operator.lt, " < "),
    "le": (operator.le, " <= "),
    "gt": (operator.gt, " > "),
    "ge": (operator.ge, " >= "),
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "not": operator.not_,
    "float": float,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "sqrt": math.sqrt,
    "log": math.log,
    "log2": math.log2,
}
_OPPOSITE = {"lt": "ge", "ne": "eq"}  # as a reader would have it
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not")
_TIGHT = ("mul", "floordiv", "truediv", "mod", "bitand", "bitor")  # operators whose sums are put in brackets


# ---------------------------------------------------------------- sizes made of sizes

ROUNDED = ("floordiv", "mod")
LENGTHS_TRIED = 4096
ALIKE = 2  # dims of 0 and 1 are viewed, and broadcast, otherwise


def rounded(part: Tree, sizes: Sizes) -> Condition:
    """Of a size that forward makes of another, ``(s - 5)//3 + 1``: that it is none of 0 and 1, or the one it is."""
    here = _value(part, sizes)
    return Condition(("not", ("lt", part, ALIKE) if here >= ALIKE else ("ne", part, int(here))))


def rounded_in(conditions: Sequence[Condition]) -> dict[str, Tree]:
    """The sizes of which :func:`rounded` has told among ``conditions``, by their texts.

    Of those that are multiples of one another, but for a constant, the first: it tells the others.
    """
    found: list[Tree] = []
    for part in rounded_parts(conditions):
        (name,) = _names(part)
        if not any(_is_multiple(part, other, name) for other in (name, *found) if _names(other) == {name}):
            found.append(part)
    return {_text(part, is_tight=True): part for part in found}


def rounded_parts(conditions: Sequence[Condition]) -> list[Tree]:
    """All sizes of which :func:`rounded` has told among ``conditions``."""
    return [one.tree[1][1] for one in conditions if _tells_of_rounded(one.tree)]  # type: ignore[index]


def _tells_of_rounded(tree: Tree) -> bool:
    """torch itself never asks for what is not less, or not unequal."""
    if not isinstance(tree, tuple) or tree[0] != "not" or not isinstance(tree[1], tuple):
        return False
    question, part, *_ = tree[1]
    return question in ("lt", "ne") and is_rounded(part) and len(_names(part)) == 1


def _is_multiple(part: Tree, other: Tree, name: str) -> bool:
    """Whether ``part`` is a multiple of ``other``, but for a constant, at all lengths."""
    pairs = [(_value(other, {name: length}), _value(part, {name: length})) for length in range(1, LENGTHS_TRIED)]
    (x, y), (high, there) = pairs[0], next((pair for pair in pairs if pair[0] != pairs[0][0]), pairs[0])
    return high != x and all((one - y) * (high - x) == (there - y) * (at - x) for at, one in pairs)


def is_rounded(part: Tree) -> bool:
    """Whether something in ``part`` is rounded, and nothing is divided by what may be zero."""
    if not isinstance(part, tuple):
        return False
    divided = (part[0] in ROUNDED or part[0] == "truediv") and not (type(part[2]) is int and part[2] > 0)
    return not divided and (part[0] in ROUNDED or any(map(is_rounded, part[1:])))


def value_of(part: Tree, sizes: Sizes) -> Any:
    """``part`` at ``sizes``. Raises ArithmeticError where it has no value."""
    return _value(part, sizes)


def text_of(part: Tree) -> str:
    return _text(part)


def names_in(part: Tree) -> set[str]:
    """The sizes of which ``part`` is made."""
    return _names(part)


def put(tree: Tree, trees: Mapping[str, Tree]) -> Tree:
    """``tree``, with ``trees`` in the places of some sizes."""
    if isinstance(tree, tuple):
        return (tree[0], *(put(part, trees) for part in tree[1:]))
    return trees.get(tree, tree) if isinstance(tree, str) else tree


def size_of_json(data: Any, names: Sequence[str]) -> Tree:
    """The expression of sizes with these ``names`` that a file describes. Raises ValueError for anything else."""
    return _checked(data, names, [MOST_PARTS])


def rounded_of_json(data: Any, names: Sequence[str]) -> tuple[str, Tree]:
    """(text, tree) of what a file says of such a size. Raises ValueError for anything else."""
    part = size_of_json(data, names)
    if not is_rounded(part):
        raise ValueError(f"no size made of others: {str(data):.100}")
    return _text(part, is_tight=True), part


def as_json(part: Tree) -> Any:
    return _plain(part)


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Condition:
    """One question and its answer: ``tree`` is true of the sizes for which a program was made.

    Attributes:
        line: where the user's code asks that; "" where torch does.
        is_number: whether it has made a number of the size there, so that its questions about that are not seen.
    """

    tree: Tree
    line: str = field(default="", compare=False)
    is_number: bool = field(default=False, compare=False)

    def holds(self, sizes: Sizes) -> bool:
        """Whether the answer is the same at ``sizes``; it is not where the question has no answer (a zero divides)."""
        try:
            return bool(_value(self.tree, sizes))
        except (ArithmeticError, ValueError):
            return False

    def excludes(self, values: Mapping[str, Sequence[int]]) -> bool:
        """Whether it is false for some of ``values`` of the sizes, of which at most ``MOST_TRIED`` are tried."""
        names = sorted(self.names)
        each = max(2, int(MOST_TRIED ** (1 / max(len(names), 1))))
        tried = [values[name][:: -(-len(values[name]) // each)] for name in names]
        return any(not self.holds(dict(zip(names, sizes))) for sizes in itertools.product(*tried))

    @property
    def names(self) -> set[str]:
        """The sizes that it is about."""
        return _names(self.tree)

    def put(self, trees: Mapping[str, Tree]) -> Condition:
        """This one, with ``trees`` in the places of some sizes."""
        return replace(self, tree=put(self.tree, trees)) if self.names & trees.keys() else self

    @property
    def told(self) -> str:
        """Where it is asked, in words; "" where torch asks."""
        made = "Python makes a number of it, at " if self.is_number else "at "
        return made + self.line if self.line else ""

    def __str__(self) -> str:
        return _text(self.tree)

    @classmethod
    def of_json(cls, data: Any, names: Sequence[str]) -> Condition:
        """The condition that a file describes, of sizes with these ``names``. Raises ValueError for anything else."""
        left = [MOST_PARTS]
        tree = _checked(data, names, left)
        if not isinstance(tree, tuple) or tree[0] not in COMPARISONS:
            raise ValueError(f"no condition: {str(data):.100}")
        return cls(tree)

    def as_json(self) -> Any:
        return _plain(self.tree)


def _names(tree: Tree) -> set[str]:
    if isinstance(tree, tuple):
        return set[str]().union(*map(_names, tree[1:]))
    return {tree} if isinstance(tree, str) else set()


def _value(tree: Tree, sizes: Mapping[str, int]) -> Any:
    if not isinstance(tree, tuple):
        return sizes[tree] if isinstance(tree, str) else tree
    name, *parts = tree
    values = (_value(part, sizes) for part in parts)
    if name in _FOLDED:
        return reduce(_FOLDED[name][0], values)
    return _BINARY[name][0](*values) if name in _BINARY else _UNARY[name](*values)


def _text(tree: Tree, is_tight: bool = False) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    name, *parts = tree
    if name in ("min", "max") or name in _UNARY and name != "not":
        return f"{name}({', '.join(map(_text, parts))})"
    if name == "not" and isinstance(parts[0], tuple) and parts[0][0] in _OPPOSITE:
        return _text((_OPPOSITE[parts[0][0]], *parts[0][1:]), is_tight)
    if name == "not":
        return f"not ({_text(parts[0])})"
    sign = (_FOLDED.get(name) or _BINARY[name])[1]
    text = sign.join(_text(part, name in _TIGHT or name in ("and", "or")) for part in parts)
    return f"({text})" if is_tight else text


def _plain(tree: Tree) -> Any:
    return [tree[0], *map(_plain, tree[1:])] if isinstance(tree, tuple) else tree


def is_plain(tree: Tree) -> bool:
    """Whether a file may say so: of a few parts, with numbers of an ordinary size."""
    try:
        _checked(_plain(tree), sorted(_names(tree)), [MOST_PARTS])
    except ValueError:
        return False
    return True


def _checked(data: Any, names: Sequence[str], left: list[int]) -> Tree:
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("a condition of too many parts")
    if type(data) in (int, float) and abs(data) < 1 << 62:
        return data  # type: ignore[no-any-return]
    if isinstance(data, str) and data in names:
        return data
    if isinstance(data, list) and data and isinstance(data[0], str):
        name, *parts = data
        count = len(parts)
        if name in _FOLDED and count > 1 or name in _BINARY and count == 2 or name in _UNARY and count == 1:
            return (name, *(_checked(part, names, left) for part in parts))
    raise ValueError(f"no condition of these sizes: {str(data):.100}")
