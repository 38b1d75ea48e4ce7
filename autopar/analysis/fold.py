"""Repeated runs of lines: a sequence in which copies follow their original, line by line, is found and described.

A line has a key (everything but names and numbers), the numbers in it, and the earlier lines it refers to. Copy ``k``
of a run follows its original when keys are equal and each number and each reference goes from copy to copy by one rule:

- a reference into the original becomes the same line of the copy;
- a reference to a line before it stays, or becomes a certain line of the copy before (a *carry*), or goes by name from
  the parameter of one block to that of the next, or goes some copies further in an earlier fold;
- a number grows by the same amount.

A line that does not follow is an *exception* of its copy, to be printed in full; copies with many of them end the run.
So an original, the rules and the exceptions say exactly what the copies are. Candidates for the length of a run are the
commonest distances between lines of equal key; the work is near to linear in the number of lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

PERIODS, STARTS = 12, 3  # how many lengths and starts are tried for each run
LEAST_HIDDEN = 5  # fewer lines are not worth a sentence


@dataclass(frozen=True)
class Line:
    """One line of a text: ``key`` is equal for lines that differ in names and numbers only."""

    key: Hashable
    refs: tuple[int, ...] = ()  # positions of earlier lines
    numbers: tuple[int, ...] = ()
    block: str = ""  # the module it belongs to; runs are cut where that changes
    kind: int = 0  # lines of two kinds are never in one run
    named: bool = False  # its numbers are in its name: "the same of block 3" says which line it is


@dataclass(frozen=True, eq=False)
class Reference:
    """How a reference goes from copy to copy: ``same`` line, ``carry`` from the copy before, ``shift`` in a fold, or
    ``named``: the line whose numbers are so much larger."""

    form: str
    amount: int = 0  # carry: the line's place in the original; shift: copies further for each copy
    through: Fold | None = None  # shift: the earlier fold
    steps: tuple[int, ...] = ()  # named: what its numbers grow by for each copy


@dataclass
class Fold:
    """Lines ``start`` to ``start + length`` and their ``copies`` (the original counted), one after the other."""

    start: int
    length: int
    copies: int = 1
    references: dict[int, Reference] = field(default_factory=dict)  # line before the original -> its rule
    growth: dict[tuple[int, int], int] = field(default_factory=dict)  # (place, number of its line) -> for each copy
    exceptions: list[int] = field(default_factory=list)  # lines of copies that do not follow

    @property
    def stop(self) -> int:
        """The first line behind the last copy."""
        return self.start + self.copies * self.length

    @property
    def hidden(self) -> int:
        return (self.copies - 1) * self.length - len(self.exceptions)

    def place(self, line: int) -> tuple[int, int]:
        """(copy, place in the copy) of a line of the run."""
        return divmod(line - self.start, self.length)


def folds(lines: Sequence[Line]) -> list[Fold]:
    """The runs of ``lines``, in order of their starts; one inside the original of another comes after it."""
    found = _Folds(lines)
    start = 0
    for stop in range(1, len(lines) + 1):
        if stop == len(lines) or lines[stop].kind != lines[start].kind:
            found.search(start, stop)
            start = stop
    return sorted(found.folds, key=lambda fold: (fold.start, -fold.length))


class _Folds:
    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.folds: list[Fold] = []
        self.inside: dict[int, list[Fold]] = {}  # line -> the folds it is in, outermost first
        ids: dict[Hashable, int] = {}
        plain = [ids.setdefault(line.key, len(ids)) for line in lines]
        wide: dict[Hashable, int] = {}
        self.keys = plain
        named = Counter((plain[i], line.numbers) for i, line in enumerate(lines) if line.named)
        self.by_name = {
            (plain[i], line.numbers): i
            for i, line in enumerate(lines)
            if line.named and named[plain[i], line.numbers] == 1
        }
        self.contexts = [  # with the lines referred to: tells apart what is alike within a block
            wide.setdefault((plain[i], tuple(plain[ref] for ref in line.refs)), len(wide))
            for i, line in enumerate(lines)
        ]

    def search(self, start: int, stop: int) -> None:
        """Finds the folds between two lines: the run that hides most, then those before, inside and behind it."""
        pending = [(start, stop)]
        while pending:
            start, stop = pending.pop()
            best = self._best(start, stop)
            if best is None:
                continue
            self.folds.append(best)
            for line in range(best.start, best.stop):
                self.inside.setdefault(line, []).append(best)
            pending += [
                (best.stop, stop),
                (best.start, best.start + best.length),
                (start, best.start),
            ]

    def _best(self, start: int, stop: int) -> Fold | None:
        best: Fold | None = None
        for period in self._periods(start, stop):
            if best is not None and stop - start - period <= best.hidden:
                continue
            for first in self._starts(start, stop, period):
                fold = self._follow(first, period, stop)
                if fold.copies > 1 and fold.hidden >= LEAST_HIDDEN and (best is None or fold.hidden > best.hidden):
                    best = fold
        return best

    def _periods(self, start: int, stop: int) -> list[int]:
        last: dict[int, int] = {}
        votes: Counter[int] = Counter()
        for line in range(start, stop):
            before = last.get(self.contexts[line])
            if before is not None:
                votes[line - before] += 1
            last[self.contexts[line]] = line
        ranked = sorted(votes.items(), key=lambda item: (-item[1], item[0]))
        return [period for period, _ in ranked[:PERIODS]]

    def _starts(self, start: int, stop: int, period: int) -> Iterator[int]:
        """Where a run of this period may start: at block boundaries of the longest stretches of equal keys."""
        stretches: list[tuple[int, int]] = []  # (length, first line)
        length = 0
        for line in range(start + period, stop + 1):
            if line < stop and self.keys[line] == self.keys[line - period]:
                length += 1
                continue
            if length >= max(period // 2, 1):
                stretches.append((length, line - length - period))
            length = 0
        stretches.sort(key=lambda item: (-item[0], item[1]))
        for length, first in stretches[:STARTS]:
            aligned = self._aligned(first, max(length % period if length >= period else length - 1, 0), period)
            earliest = aligned
            while earliest - period >= start and self._alike(earliest - period, period):
                earliest -= period
            # The first blocks may take what no later one does: a run may start behind them.
            yield from dict.fromkeys((earliest, earliest + period, earliest + 2 * period, aligned))

    def _aligned(self, first: int, slack: int, period: int) -> int:
        """Among ``first`` to ``first + slack``: the start of an original that mixes fewest blocks."""
        window = Counter(self.lines[line].block for line in range(first, min(first + period, len(self.lines))))
        best, fewest = first, (len(window), 0)
        for start in range(first + 1, first + slack + 1):
            if start + period > len(self.lines):
                break
            gone, come = self.lines[start - 1].block, self.lines[start + period - 1].block
            window[gone] -= 1
            if not window[gone]:
                del window[gone]
            window[come] += 1
            cost = (len(window), int(gone == self.lines[start].block))
            if cost < fewest:
                best, fewest = start, cost
        return best

    def _alike(self, start: int, period: int) -> bool:
        differ = sum(self.keys[line] != self.keys[line + period] for line in range(start, start + period))
        return differ <= _allowed(period)

    def _follow(self, start: int, period: int, stop: int) -> Fold:
        """The fold of as many copies as follow the original at ``start``."""
        fold = Fold(start, period)
        while fold.stop + period <= stop:
            exceptions = self._exceptions(fold, fold.copies)
            if exceptions is None:
                break
            fold.exceptions += exceptions
            fold.copies += 1
        return fold

    def _exceptions(self, fold: Fold, copy: int) -> list[int] | None:
        """Lines of this copy that do not follow; None if they are too many. The first copy settles the rules."""
        references, growth = dict(fold.references), dict(fold.growth)
        found: list[int] = []
        for place in range(fold.length):
            line = fold.start + copy * fold.length + place
            if not self._follows(fold, copy, place, references, growth):
                found.append(line)
                if len(found) > _allowed(fold.length):
                    return None
        fold.references, fold.growth = references, growth
        return found

    def _follows(
        self,
        fold: Fold,
        copy: int,
        place: int,
        references: dict[int, Reference],
        growth: dict[tuple[int, int], int],
    ) -> bool:
        at = fold.start + copy * fold.length + place
        original, line = self.lines[fold.start + place], self.lines[at]
        if self.keys[at] != self.keys[fold.start + place] or len(original.refs) != len(line.refs):
            return False
        news: dict[int, Reference] = {}
        for old, new in zip(original.refs, line.refs):
            if old >= fold.start:
                if new != old + copy * fold.length:
                    return False
                continue
            rule = references.get(old, news.get(old)) or self._rule(fold, copy, old, new)
            if rule is None or new != self._goes_to(fold, copy, old, rule):
                return False
            news[old] = rule
        grown: dict[tuple[int, int], int] = {}
        for number, (first, value) in enumerate(zip(original.numbers, line.numbers)):
            by, rest = divmod(value - first, copy)
            if rest or by != growth.get((place, number), by if copy == 1 else None):
                return False
            grown[place, number] = by
        references.update(news)
        growth.update(grown)
        return True

    def _rule(self, fold: Fold, copy: int, old: int, new: int) -> Reference | None:
        """The rule that takes ``old``, before the original, to ``new`` in copy 1; later copies settle no rules."""
        if copy != 1:
            return None
        if new == old:
            return Reference("same")
        if fold.start <= new < fold.start + fold.length:
            return Reference("carry", new - fold.start)
        first, then = self.lines[old], self.lines[new]
        if first.named and then.named and self.keys[old] == self.keys[new]:
            return Reference("named", steps=tuple(b - a for a, b in zip(first.numbers, then.numbers)))
        for earlier in self.inside.get(old, ()):
            (old_copy, old_place), (new_copy, new_place) = earlier.place(old), earlier.place(new)
            if old_place == new_place and earlier.start <= new < earlier.stop:
                return Reference("shift", new_copy - old_copy, earlier)
        return None

    def _goes_to(self, fold: Fold, copy: int, old: int, rule: Reference) -> int | None:
        if rule.steps:
            numbers = tuple(a + copy * step for a, step in zip(self.lines[old].numbers, rule.steps))
            return self.by_name.get((self.keys[old], numbers))
        if rule.through is None:
            return old if rule.form == "same" else fold.start + (copy - 1) * fold.length + rule.amount
        new = old + copy * rule.amount * rule.through.length
        return new if rule.through.start <= new < rule.through.stop else None


def _allowed(length: int) -> int:
    """How many lines of a copy may differ, each of them printed in full."""
    return 0 if length < 5 else 1 + length // 20
