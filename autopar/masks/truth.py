"""Conjunctions of clauses over the terms of :mod:`autopar.operators.predicates`: and, or, not, and any truth table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from autopar.operators.predicates import Before, Chunk, Clause, Compare, Formula, Term, Within

Truth: TypeAlias = frozenset[frozenset[Term]]  # all clauses hold; in each, one of the terms

TRUE: Truth = frozenset()
FALSE: Truth = frozenset({frozenset()})
MOST_CLAUSES = 16  # a longer formula is no description any more


class TooLongError(Exception):
    """A formula of more than ``MOST_CLAUSES`` clauses."""


def of(term: Term) -> Truth:
    return frozenset({frozenset({term})})


def both(*parts: Truth) -> Truth:
    return _absorbed(frozenset().union(*parts))


def either(*parts: Truth) -> Truth:
    found = FALSE
    for part in parts:
        found = _absorbed(frozenset(a | b for a, b in itertools.product(found, part)))
    return found


def opposite(truth: Truth) -> Truth:
    return either(*(both(*(of(term.opposite()) for term in clause)) for clause in truth)) if truth else FALSE


def of_table(parts: Sequence[Truth], holds: Callable[[tuple[bool, ...]], bool]) -> Truth:
    """The conjunction of the prime implicates of a function of a few truths (Quine 1955)."""
    rows = list(itertools.product((True, False), repeat=len(parts)))
    shown, hidden = [row for row in rows if holds(row)], {row for row in rows if not holds(row)}
    clauses = sorted(
        itertools.product((True, False, None), repeat=len(parts)), key=lambda clause: sum(x is not None for x in clause)
    )
    found = TRUE
    for clause in clauses:
        fails = {row for row in hidden if not _meets(row, clause)}
        if fails and all(_meets(row, clause) for row in shown):
            hidden -= fails
            terms = [part if sign else opposite(part) for part, sign in zip(parts, clause) if sign is not None]
            found = both(found, either(*terms))
    return found


def _meets(row: Sequence[bool], clause: Sequence[bool | None]) -> bool:
    return any(a is b for a, b in zip(row, clause))


def over(truth: Truth, rows: int, columns: int) -> Truth:
    """What is left of it for positions below ``rows`` and ``columns``."""
    clauses = set()
    for clause in truth:
        states = {term: term.state(range(rows), range(columns), None) for term in clause}
        if "all" not in states.values():
            clauses.add(frozenset(term for term, state in states.items() if state == "mixed"))
    return _absorbed(frozenset(clauses))


def formula(truth: Truth) -> Formula:
    """In a fixed order: what relates positions first, vectors last."""
    clauses: list[Clause] = [tuple(sorted(clause, key=_order)) for clause in truth]
    return Formula(tuple(sorted(clauses, key=lambda clause: (len(clause) > 1, [_order(term) for term in clause]))))


def leaves_each_row_a_key(truth: Truth, rows: int, columns: int) -> bool:
    """Whether every row may attend to its own position, whatever the vectors hold."""
    return rows <= columns and all(any(map(_holds_on_diagonal, clause)) for clause in truth)


def _holds_on_diagonal(term: Term) -> bool:
    match term:
        case Before(offset):
            return offset >= 0
        case Within(width):
            return width > 0
        case Chunk(_, same):
            return same
        case Compare(left, relation, right):
            return left == right and relation in ("==", "<=", ">=")
    return False


def _order(term: Term) -> tuple[int, str]:
    kinds = ["Before", "Within", "Chunk", "Bound", "Compare", "Flag"]
    return kinds.index(type(term).__name__), str(term)


def _absorbed(truth: Truth) -> Truth:
    """Without clauses that always hold or follow from another clause."""
    kept: list[frozenset[Term]] = []
    for clause in sorted(truth, key=lambda clause: (len(clause), sorted(map(str, clause)))):
        clause = _weakest(clause)
        if any(term.opposite() in clause for term in clause) or any(_follows(other, clause) for other in kept):
            continue
        kept = [other for other in kept if not _follows(clause, other)] + [clause]
    if len(kept) > MOST_CLAUSES:
        raise TooLongError
    return frozenset(kept)


def _weakest(terms: Iterable[Term]) -> frozenset[Term]:
    """A clause without terms that imply another of its terms."""
    terms = frozenset(terms)
    return frozenset(term for term in terms if not any(other != term and _implies(term, other) for other in terms))


def _follows(clause: frozenset[Term], other: frozenset[Term]) -> bool:
    """Whether ``other`` holds wherever ``clause`` does."""
    return all(any(_implies(a, b) for b in other) for a in clause)


def _implies(term: Term, other: Term) -> bool:
    match term, other:
        case Before(a), Before(b):
            return a <= b
        case Within(a), Within(b):
            return a <= b
    return term == other
