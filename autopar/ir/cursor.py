"""A position in a line of the text form, and readers of parts of a line that need no graph: names, sizes, layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from autopar.errors import ProgramFileError
from autopar.ir.layout import Factor, Layout
from autopar.mesh import Mesh, axes_of

WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
GROUP = re.compile(r"[A-Za-z_]\w*(:\w+)?(\+[A-Za-z_]\w*(:\w+)?)*", re.ASCII)  # the name of an axis, or of several
COUNT = re.compile(r"\d+", re.ASCII)
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
PLAIN = re.compile(r"[A-Za-z0-9_.]+")  # targets that need no quotes

# More than any program has: what a text says is bounded before anything of that size is made.
MOST_DIGITS = 18  # of a size or a position: it fits 64 bits
MOST_LETTERS = 40  # of a whole number among arguments: no operator takes more than 64 bits
MOST_ELEMENTS = 1 << 50  # of a tensor
MOST_DIMS, MOST_FACTORS = 64, 64  # of a tensor, of a dim
MOST_RANKS = 1 << 24
DEEPEST = 16  # brackets inside brackets

T = TypeVar("T")


class Cursor:
    """A position in one line of text."""

    def __init__(self, number: int, line: str) -> None:
        self.number, self.line, self.at = number, line, 0
        self.depth = 0  # of the brackets that are open
        self.blank()

    def blank(self) -> None:
        while self.at < len(self.line) and self.line[self.at] in " \t":
            self.at += 1

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """The text that ``pattern`` matches at the cursor, which moves past it; None if it does not match."""
        found = pattern.match(self.line, self.at)
        if not found or not found[0]:
            return None
        self.at = found.end()
        self.blank()
        return found[0]

    def sign(self, characters: str) -> bool:
        if not self.line.startswith(characters, self.at):
            return False
        self.at += len(characters)
        self.blank()
        return True

    def expect(self, pattern: re.Pattern[str], what: str) -> str:
        found = self.take(pattern)
        return found if found is not None else self.fail(what)

    def expect_sign(self, characters: str) -> None:
        if not self.sign(characters):
            self.fail(f"'{characters}'")

    def expect_number(self, what: str) -> int:
        start, digits = self.at, self.expect(COUNT, what)
        if len(digits) > MOST_DIGITS:
            self.fail(f"{what} of at most {MOST_DIGITS} digits", digits[:MOST_DIGITS], start)
        return int(digits)

    def string(self) -> str | None:
        found = self.take(STRING)
        if found is None:
            return None
        try:
            return str(json.loads(found))
        except ValueError:
            return self.fail("a string in JSON form")

    def target(self, what: str) -> str:
        """A parameter, input or output name, quoted where it has other characters than letters, digits, _ and dots."""
        quoted = self.string()
        return quoted if quoted is not None else self.expect(PLAIN, what)

    def looking_at(self, pattern: re.Pattern[str]) -> bool:
        return pattern.match(self.line, self.at) is not None

    def next_is(self, characters: str) -> bool:
        return self.line.startswith(characters, self.at)

    def more(self) -> bool:
        """Whether the line continues at the cursor; a comment does not count."""
        return self.at < len(self.line) and self.line[self.at] != "#"

    def comment(self) -> str:
        """The text after the ``#`` that must follow, or ``""`` at the end of the line."""
        if self.more():
            self.fail("the end of the line")
        return self.line[self.at + 1 :].strip()

    def fail(self, expected: str, found: str | None = None, at: int | None = None) -> NoReturn:
        """Raise ProgramFileError. ``found``: the text at column ``at``; by default the next word."""
        rest = self.line[self.at :].split()
        what = f"'{found}'" if found else f"'{rest[0]}'" if rest else "the end of the line"
        column = (self.at if at is None else at) + 1
        raise ProgramFileError(
            f"line {self.number}, column {column}: expected {expected}, found {what}\n  {self.line.strip()}"
        )


def listed(cursor: Cursor, end: str, item: Callable[[], T]) -> list[T]:
    """Items between commas, up to and including ``end``; a comma may stand before the end."""
    found: list[T] = []
    cursor.depth += 1
    if cursor.depth > DEEPEST:
        cursor.fail(f"at most {DEEPEST} brackets inside each other")
    while not cursor.sign(end):
        if found:
            cursor.expect_sign(",")
            if cursor.sign(end):
                break
        found.append(item())
    cursor.depth -= 1
    return found


def _factor(cursor: Cursor, mesh: Mesh) -> Factor:
    sizes = [cursor.expect_number("a size")]
    while cursor.sign("+"):
        sizes.append(cursor.expect_number("a size"))
    axes, mirrored, ragged = [], "", cursor.sign("?")
    order = []
    if cursor.sign("<"):
        while not cursor.sign(">"):
            order.append(cursor.expect_number("an index"))
        if len(order) != sum(sizes) or sorted(order) != list(range(sum(sizes))):
            cursor.fail(f"the numbers from 0 to {sum(sizes) - 1} in some order")
    while cursor.sign("@"):
        axes.append(take_axis(cursor, mesh))
        if cursor.sign("~"):
            mirrored = axes[-1]
    unit = math.gcd(*sizes) or 1
    ratio = tuple(size // unit for size in sizes) if len(sizes) > 1 else (1,)
    return Factor(sum(sizes), tuple(axes), ratio, mirrored, ragged, tuple(order))


def take_axis(cursor: Cursor, mesh: Mesh) -> str:
    """The name of an axis, or of several merged ones, in normal form."""
    before = cursor.at
    name = cursor.expect(GROUP, "the name of an axis")
    if not set(mesh.names).issuperset(axes_of(name)):
        cursor.fail(f"an axis of {mesh}", name, before)
    try:
        mesh.size(name)
    except ValueError as problem:
        cursor.fail(f"the name of a group of ranks ({problem})", name, before)
    return mesh.merged([name])


def _dim(cursor: Cursor, mesh: Mesh) -> tuple[Factor, ...]:
    if not cursor.sign("("):
        return (_factor(cursor, mesh),)
    factors = []
    while not cursor.sign(")"):
        factors.append(_factor(cursor, mesh))
    if not 0 < len(factors) <= MOST_FACTORS:
        cursor.fail(f"1 to {MOST_FACTORS} factors of a dim")
    return tuple(factors)


def take_layout(cursor: Cursor, mesh: Mesh) -> Layout:
    cursor.expect_sign("[")
    start, dims = cursor.at, tuple(listed(cursor, "]", lambda: _dim(cursor, mesh)))
    if len(dims) > MOST_DIMS or math.prod(max(factor.size, 1) for dim in dims for factor in dim) > MOST_ELEMENTS:
        cursor.fail(f"a tensor of at most {MOST_DIMS} dims and {MOST_ELEMENTS:,} elements", None, start)

    def pending() -> tuple[str, str]:
        op = cursor.expect(WORD, "a reduction such as 'sum'")
        cursor.expect_sign(":")
        return take_axis(cursor, mesh), op

    reductions = listed(cursor, "}", pending) if cursor.sign("{") else []
    return Layout(dims, tuple((axis, op) for group, op in reductions for axis in group.split("+")))
