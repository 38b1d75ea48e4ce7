"""Which scores of an attention take part: a formula over the row position i, the column position j, and vectors.

    j<=i                causal; also j<=i+3, j<=i-2
    i-j<8               a window; |i-j| <= 7 is "i-j<8 & j<=i+7"
    i//8==j//8          chunks (also !=)
    j<5  i>=5           a prefix, a part of the rows
    v0[i]==v1[j]        a vector at the row against one at the column (also != < <= > >=): documents, left paddings
    v2[j]  !v2[i]       a bool vector at the column or row: keys that are no padding

A formula is a conjunction of clauses, a clause a disjunction of such terms: ``j<=i & (j<5 | v0[i]==v0[j]) & v1[j]``.
The empty text hides nothing. Positions count from 0 in the whole sequence of queries, and in that of keys, which may
have another length. Vectors are (..., S) over the whole sequence that they are looked up with; their leading dims
broadcast against the batch dims of the attention (without heads).

Over a rectangle of positions a term holds everywhere, nowhere or somewhere: :meth:`Formula.rest` tells from numbers
alone where work can be skipped, and from vectors too where it is given them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

State = Literal["all", "none", "mixed"]  # a term holds on all, none or some of a rectangle
Letter = Literal["i", "j"]
Vectors: TypeAlias = Sequence[Tensor]

_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
OPPOSITE = {"==": "!=", "!=": "==", "<=": ">", ">": "<=", ">=": "<", "<": ">="}


def _state(everywhere: bool, nowhere: bool) -> State:
    return "all" if everywhere else "none" if nowhere else "mixed"


@dataclass(frozen=True)
class Before:
    """``j <= i + offset``"""

    offset: int = 0

    def __str__(self) -> str:
        return "j<=i" + (f"{self.offset:+d}" if self.offset else "")

    def opposite(self) -> Term:
        return Within(-self.offset)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        return columns <= rows[:, None] + self.offset

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        return _state(columns[-1] <= rows[0] + self.offset, columns[0] > rows[-1] + self.offset)

    def edges(self, rows: range) -> tuple[int, ...]:
        """The columns where the state over these rows may change; a square on the diagonal lies between the two."""
        return rows[0] + self.offset, rows[-1] + 1 + self.offset


@dataclass(frozen=True)
class Within:
    """``i - j < width``"""

    width: int

    def __str__(self) -> str:
        return f"i-j<{self.width}"

    def opposite(self) -> Term:
        return Before(-self.width)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        return columns > rows[:, None] - self.width

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        return _state(rows[-1] - columns[0] < self.width, rows[0] - columns[-1] >= self.width)

    def edges(self, rows: range) -> tuple[int, ...]:
        return rows[0] - self.width + 1, rows[-1] - self.width + 1


@dataclass(frozen=True)
class Chunk:
    """``i // size == j // size``, or ``!=``"""

    size: int
    same: bool = True

    def __str__(self) -> str:
        return f"i//{self.size}{'==' if self.same else '!='}j//{self.size}"

    def opposite(self) -> Term:
        return Chunk(self.size, not self.same)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        return (rows[:, None] // self.size == columns // self.size) == self.same

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        first, last, left, right = (x // self.size for x in (rows[0], rows[-1], columns[0], columns[-1]))
        equal, apart = first == last == left == right, last < left or first > right
        return _state(equal, apart) if self.same else _state(apart, equal)

    def edges(self, rows: range) -> tuple[int, ...]:
        return rows[0] // self.size * self.size, (rows[-1] // self.size + 1) * self.size


@dataclass(frozen=True)
class Bound:
    """``j < end`` or ``i < end``, or ``>=``"""

    letter: Letter
    end: int
    below: bool = True

    def __str__(self) -> str:
        return f"{self.letter}{'<' if self.below else '>='}{self.end}"

    def opposite(self) -> Term:
        return Bound(self.letter, self.end, not self.below)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        return ((rows[:, None] if self.letter == "i" else columns[None]) < self.end) == self.below

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        span = rows if self.letter == "i" else columns
        under, over = span[-1] < self.end, span[0] >= self.end
        return _state(under, over) if self.below else _state(over, under)

    def edges(self, rows: range) -> tuple[int, ...]:
        return (self.end,) if self.letter == "j" else ()


@dataclass(frozen=True)
class Compare:
    """``v<left>[i] relation v<right>[j]``"""

    left: int
    relation: str
    right: int

    def __str__(self) -> str:
        return f"v{self.left}[i]{self.relation}v{self.right}[j]"

    def opposite(self) -> Term:
        return Compare(self.left, OPPOSITE[self.relation], self.right)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        left = vectors[self.left].index_select(-1, rows).unsqueeze(-1)
        right = vectors[self.right].index_select(-1, columns).unsqueeze(-2)
        found: Tensor = _RELATIONS[self.relation](left, right)
        return found

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        """By the least and the largest elements of the two slices, for each row of the batch."""
        if vectors is None:
            return "mixed"
        least, most = _extremes(vectors[self.left], rows)
        low, high = _extremes(vectors[self.right], columns)
        if self.relation in ("==", "!="):
            same, apart = (least == most) & (low == high) & (least == low), (most < low) | (least > high)
            yes, no = (same, apart) if self.relation == "==" else (apart, same)
        elif self.relation in ("<", "<="):
            yes, no = _RELATIONS[self.relation](most, low), _RELATIONS[OPPOSITE[self.relation]](least, high)
        else:
            yes, no = _RELATIONS[self.relation](least, high), _RELATIONS[OPPOSITE[self.relation]](most, low)
        return _state(bool(yes.all()), bool(no.all()))

    def edges(self, rows: range) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Flag:
    """``v<vector>[j]`` or ``[i]``, or ``!`` before it"""

    vector: int
    letter: Letter
    wanted: bool = True

    def __str__(self) -> str:
        return f"{'' if self.wanted else '!'}v{self.vector}[{self.letter}]"

    def opposite(self) -> Term:
        return Flag(self.vector, self.letter, not self.wanted)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        found = vectors[self.vector].index_select(-1, rows if self.letter == "i" else columns)
        found = found.unsqueeze(-1 if self.letter == "i" else -2)
        return found if self.wanted else found.logical_not()

    def state(self, rows: range, columns: range, vectors: Vectors | None) -> State:
        if vectors is None:
            return "mixed"
        span = rows if self.letter == "i" else columns
        part = vectors[self.vector][..., span.start : span.stop]
        every, some = bool(part.all()), bool(part.any())
        return _state(every, not some) if self.wanted else _state(not some, every)

    def edges(self, rows: range) -> tuple[int, ...]:
        return ()


Term: TypeAlias = Before | Within | Chunk | Bound | Compare | Flag
Clause: TypeAlias = tuple[Term, ...]  # one of them holds


def _extremes(vector: Tensor, span: range) -> tuple[Tensor, Tensor]:
    part = vector[..., span.start : span.stop]
    return part.amin(-1), part.amax(-1)


@dataclass(frozen=True)
class Formula:
    """All ``clauses`` hold; see the top of this file."""

    clauses: tuple[Clause, ...] = ()

    def __str__(self) -> str:
        texts = [" | ".join(map(str, clause)) for clause in self.clauses]
        alone = len(texts) == 1
        return " & ".join(text if alone or len(c) == 1 else f"({text})" for c, text in zip(self.clauses, texts))

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for clause in self.clauses for term in clause)

    @property
    def vectors(self) -> tuple[int, ...]:
        """The numbers of the vectors that it looks up."""
        found = {n for term in self.terms for n in _looked_up(term)}
        return tuple(sorted(found))

    @property
    def relates(self) -> bool:
        """Whether a term holds for some pairs of a row and a column, and not for a row or a column alone."""
        return not all(isinstance(term, (Flag, Bound)) for term in self.terms)

    def evaluate(self, rows: Tensor, columns: Tensor, vectors: Vectors) -> Tensor:
        """bool (..., R or 1, C or 1): which of the rows R and columns C (int64 vectors of positions) take part."""
        found = torch.ones(1, 1, dtype=torch.bool, device=rows.device)
        for clause in self.clauses:
            either = clause[0].evaluate(rows, columns, vectors)
            for term in clause[1:]:
                either = either | term.evaluate(rows, columns, vectors)
            found = found & either
        return found

    def rest(self, rows: range, columns: range, vectors: Vectors | None = None) -> Formula | None:
        """What is left to be evaluated over a rectangle: the empty formula where all of it takes part, None where none.

        ``vectors``: tensors that can be read without waiting for a device; without them only positions decide.
        """
        left = []
        for clause in self.clauses:
            states = {term: term.state(rows, columns, vectors) for term in clause}
            if "all" in states.values():
                continue
            mixed = tuple(term for term in clause if states[term] == "mixed")
            if not mixed:
                return None
            left.append(mixed)
        return Formula(tuple(left))

    def classify(self, rows: range, columns: range, vectors: Vectors | None = None) -> State:
        """Whether all, none or some of a rectangle takes part (``mixed`` also where that is not known)."""
        rest = self.rest(rows, columns, vectors)
        return "none" if rest is None else "mixed" if rest.clauses else "all"


def _looked_up(term: Term) -> tuple[int, ...]:
    if isinstance(term, Compare):
        return term.left, term.right
    return (term.vector,) if isinstance(term, Flag) else ()


# ---------------------------------------------------------------- text

_PATTERNS: tuple[tuple[str, Callable[..., Term]], ...] = (
    (r"j<=i([+-]\d+)?", lambda offset: Before(int(offset or 0))),
    (r"i-j<(-?\d+)", lambda width: Within(int(width))),
    (r"i//(\d+)(==|!=)j//\1", lambda size, relation: Chunk(int(size), relation == "==")),
    (r"([ij])(<|>=)(-?\d+)", lambda letter, relation, end: Bound(letter, int(end), relation == "<")),
    (r"v(\d+)\[i\](==|!=|<=|>=|<|>)v(\d+)\[j\]", lambda a, relation, b: Compare(int(a), relation, int(b))),
    (r"(!?)v(\d+)\[([ij])\]", lambda no, vector, letter: Flag(int(vector), letter, not no)),
)


@lru_cache(maxsize=1024)
def parse(text: str) -> Formula:
    """The formula of a text; raises ValueError, naming the term, where there is none."""
    clauses = [clause.strip() for clause in text.split("&")] if text.strip() else []
    return Formula(tuple(tuple(map(_term, clause.strip("()").split("|"))) for clause in clauses))


def _term(text: str) -> Term:
    for pattern, build in _PATTERNS:
        if found := re.fullmatch(pattern, text.strip()):
            return build(*found.groups())
    raise ValueError(f"attention mask: {text.strip()!r} is no term over i, j and vectors, such as j<=i or v0[i]==v0[j]")
