"""The text form on one screen: repeated blocks are printed once, with what differs; for looking at, not for parsing.

    rms_norm = aten.rms_norm(all_reduce, [64], p_blocks_0_norm_weight, 1e-05) : f32[4@dp,16,64]
    ...
    # blocks.1..79 as blocks.0 (rms_norm to add_3): add_3 for all_reduce; add_161 is add_3 of blocks.79

A parameter that only enters an axis, or is only gathered, says so at the end of its line, and its name stands for the
result. A part of a tuple is written where it is used, ``split[0]``. The full form is ``str(program)``.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from autopar.analysis.fold import Fold, folds
from autopar.analysis.rows import Row, Rows, path_before
from autopar.ir.program import AnyProgram, format_program
from autopar.ir.tables import Input
from autopar.ir.text import LINE_WIDTH, GradRule, Lines, aligned
from autopar.mesh import Mesh


@dataclass(frozen=True)
class Series:
    """A number in the paths of modules that goes from copy to copy: ``blocks.0``, ``blocks.1``, ..."""

    path: str
    first: int
    step: int

    def at(self, copy: int) -> str:
        return f"{self.path}.{self.first + copy * self.step}"

    def text(self, copies: int) -> str:
        """``blocks.1..79 as blocks.0``."""
        return f"{self.path}.{progression(self.first, self.step, copies)} as {self.at(0)}"


def progression(first: int, step: int, copies: int) -> str:
    """The values of the copies after the first one: ``1``, ``1..79``, ``78..0``, ``3, 6 .. 33``."""
    start, last = first + step, first + (copies - 1) * step
    if copies == 2:
        return str(start)
    return (
        f"{start}..{last}"
        if abs(step) == 1
        else f"{start}, {start + step} .. {last}"
        if copies > 3
        else f"{start}, {last}"
    )


def folded(program: AnyProgram, *, origins: bool = False) -> str:
    """``program`` on one screen."""
    return format_program(program, origins=origins, form=partial(FoldedLines, earlier={}))


class FoldedLines(Lines):
    """Formats graphs as :class:`Lines` does, with repeated blocks folded, and stages that are alike printed once.

    ``earlier``: the sections printed so far by the word they begin with.
    """

    def __init__(
        self, mesh: Mesh, gradients: GradRule | None, origins: bool, earlier: dict[str, list[tuple[str, _Section]]]
    ) -> None:
        super().__init__(mesh, gradients, origins)
        self.earlier = earlier
        self.paths: dict[str, str] = {}  # inputs of the graphs -> what they are of the model, as saved ones too

    def section(
        self, heading: str, graph: fx.Graph, inputs: Sequence[Input | str | None], labels: Sequence[str]
    ) -> str:
        """The section as one text. For a later stage it may be a sentence that names the earlier stage it equals."""
        section = _Section(self, graph, inputs, labels)
        word = heading.partition(" ")[0]
        if word == "program":
            self.earlier.clear()  # the stages of a tail have the names of those before
        if word in ("program", "stage"):
            self.earlier["stages"] = [*self.earlier.get("stages", []), (heading, section)]
        stage = self.earlier["stages"][-1][0].partition(" mesh")[0]
        known = self.earlier.setdefault(word, [])
        for name, other in known:
            changes = None if self.origins else section.changes_from(other)
            if changes is not None:
                lines = (
                    [f"{heading}", f"  # as {word.strip(':')} of {name}"]
                    if word != "stage"
                    else [heading, f"  # as {name}"]
                )
                return "\n".join([lines[0], *_wrapped(f"{lines[1].strip()}{''.join(f'; {c}' for c in changes)}")])
        known.append((stage, section))
        return section.text(heading)


class _Section:
    """One graph: its rows, their folds, and the sentences about these."""

    def __init__(
        self, form: FoldedLines, graph: fx.Graph, inputs: Sequence[Input | str | None], labels: Sequence[str]
    ) -> None:
        self.form = form
        self.rows = Rows(form, form.paths, graph, inputs, labels).rows
        self.folds = folds([row.line for row in self.rows])
        self.series = {id(fold): self._series_of(fold) for fold in self.folds}

    # ------------------------------------------------------------ stages that are alike

    def changes_from(self, other: _Section) -> list[str] | None:
        """The replacements that turn ``other`` into this section, apart from names of values; None if there are none.

        That is where a line is missing or added, or has another operator, constant or type, or refers to another line.
        """
        if self.form.mesh != other.form.mesh or len(self.rows) != len(other.rows):
            return None
        numbers: dict[tuple[str, int], int] = {}
        borders: dict[str, str] = {}
        for mine, theirs in zip(self.rows, other.rows):
            if mine.line.refs != theirs.line.refs or mine.paths != theirs.paths or mine.kind != theirs.kind:
                return None
            if mine.border and theirs.border:
                borders[mine.border] = theirs.border
                continue
            if mine.pattern != theirs.pattern:
                return None
            for number, (new, old) in enumerate(zip(mine.line.numbers, theirs.line.numbers)):
                path = path_before(theirs.text, number) if number < theirs.paths else ""
                if new != old and not path or numbers.setdefault((path, old), new) != new:
                    return None
        return [*_renumbered(numbers), *(f"{new} for {old}" for new, old in borders.items() if new != old)]

    # ------------------------------------------------------------ text

    def text(self, heading: str) -> str:
        """The section: rows that are no copies, and after each run its sentences."""
        copies = {line for fold in self.folds for line in range(fold.start + fold.length, fold.stop)}
        exceptions = {line for fold in self.folds for line in fold.exceptions}
        shown = [number for number in range(len(self.rows)) if number not in copies]
        wanted = {ref for number in {*shown, *exceptions} for ref in self.rows[number].line.refs} & copies
        sentences = {  # an inner run comes before the one around it
            fold.start + fold.length: self._sentences(fold, sorted(wanted))
            for fold in reversed(self.folds)
            if fold.start not in copies
        }
        body = [number for number in shown if self.rows[number].node is not None]
        items = [number for number in shown if self.rows[number].node is None]
        lines = [heading]
        for number, text in zip(body, aligned([self._cells(self.rows[number]) for number in body])):
            lines += _due(sentences, number)
            lines.append(text)
        lines += _due(sentences, sum(row.node is not None for row in self.rows))
        return "\n".join([*lines, *self._returned(items, sentences)])

    def _cells(self, row: Row) -> tuple[str, str, str, str]:
        assert row.node is not None
        return row.node.name, row.text, row.kind, row.where

    def _returned(self, items: Sequence[int], sentences: dict[int, list[str]]) -> list[str]:
        """``return loss=a, saved b``, over several lines where that is long, with sentences where items repeat."""
        lines = ["  return"]
        for position, number in enumerate(items):
            due = _due(sentences, number)
            lines += [*due, "        "] if due else []
            item = f" {self.rows[number].text}" + ("," if position < len(items) - 1 else "")
            if len(lines[-1]) + len(item) > LINE_WIDTH and lines[-1].strip() not in ("", "return"):
                lines.append("        ")
            lines[-1] += item
        return [*lines, *_due(sentences, len(self.rows))]

    # ------------------------------------------------------------ sentences

    def _sentences(self, fold: Fold, wanted: Sequence[int]) -> list[str]:
        """The description of the copies of ``fold``: which they are, their replacements, and how each differs."""
        series = self.series[id(fold)]
        which = ", ".join(entry.text(fold.copies) for entry in series)
        which = which or f"{fold.copies - 1} more times" + (" the same" if fold.length == 1 else "")
        notes = self._notes(fold)
        notes += self._names(fold, [line for line in wanted if fold.start <= line < fold.stop])
        text = f"# {which} ({self._extent(fold)})" + (f": {'; '.join(notes)}" if notes else "")
        lines = _wrapped(text)
        for (place, number), step in sorted(fold.growth.items()):
            row = self.rows[fold.start + place]
            if step and number >= row.paths:
                value = row.line.numbers[number]
                values_text = progression(value, step, fold.copies)
                lines.append(
                    f"  #   integer {number + 1} of {self._name(fold.start + place)}, {value}, becomes {values_text}"
                )
        for line in fold.exceptions:
            copy, _ = fold.place(line)
            lines.append(f"  #   but in {self._copy_name(fold, copy)}: {self._whole(line)}")
        return lines

    def _extent(self, fold: Fold) -> str:
        first, last = fold.start, fold.start + fold.length - 1
        if self.rows[first].node is None:
            return f"the {fold.length} items from {self.rows[first].text}" if fold.length > 1 else self.rows[first].text
        return f"{self._name(first)} to {self._name(last)}" if fold.length > 1 else self._name(first)

    def _notes(self, fold: Fold) -> list[str]:
        notes = []
        own = {entry.path for entry in self.series[id(fold)]}
        carried: dict[int, list[str]] = {}
        for old, rule in fold.references.items():
            if rule.form == "carry":
                carried.setdefault(fold.start + rule.amount, []).append(self._name(old))
            elif rule.through is not None and not self.series[id(rule.through)]:
                notes.append(f"{self._name(old)} is that of {rule.amount:+d} in its run for each copy")
            elif rule.form == "same" and self._could_move(old, own):
                notes.append(f"{self._name(old)} in all of them")
        took = [f"{self._name(line)} for {' and '.join(names)}" for line, names in carried.items()]
        return [*([f"each takes from the one before {', '.join(took)}"] if took else []), *notes]

    def _could_move(self, old: int, own: set[str]) -> bool:
        """Whether a reader could expect a line that stays to move along with the number of the block."""
        for other in self.folds:
            if other.start <= old < other.stop:
                paths = {entry.path for entry in self.series[id(other)]}
                if not paths or not own or paths & own:
                    return True
        return False

    def _names(self, fold: Fold, lines: Sequence[int]) -> list[str]:
        """The names of lines of copies, to which printed lines refer."""
        called: dict[int, list[str]] = {}
        for line in lines:
            copy, place = fold.place(line)
            original = self._name(fold.start + place)
            if copy and line not in fold.exceptions and not self._says_which(line):
                called.setdefault(copy, []).append(f"{self._name(line)} is {original}")
        return [f"in {self._copy_name(fold, copy)} {', '.join(names)}" for copy, names in called.items()]

    def _says_which(self, line: int) -> bool:
        """Whether the name of a row identifies it: that of a parameter does."""
        row = self.rows[line]
        return row.node is None or row.paths > 0 or row.node.name in self.form.paths

    def _copy_name(self, fold: Fold, copy: int) -> str:
        series = self.series[id(fold)]
        if len(series) == 1:
            return series[0].at(copy)
        return "the last copy" if copy == fold.copies - 1 else f"copy {copy}"

    def _whole(self, line: int) -> str:
        row = self.rows[line]
        return f"{row.node.name} = {row.text}" + (f" : {row.kind}" if row.kind else "") if row.node else row.text

    def _name(self, line: int) -> str:
        node = self.rows[line].node
        return node.name if node is not None else self.rows[line].text

    # ------------------------------------------------------------ which blocks

    def _series_of(self, fold: Fold) -> tuple[Series, ...]:
        """The numbers of modules that change with the copies: in the rows, in those referred to, or by origin."""
        found: dict[Series, None] = {}
        for (place, number), step in fold.growth.items():
            row = self.rows[fold.start + place]
            if step and number < row.paths:
                found[Series(path_before(row.text, number), row.line.numbers[number], step)] = None
        for old, rule in fold.references.items():
            for number, step in enumerate(rule.steps):
                if step:
                    row = self.rows[old]
                    found[Series(path_before(row.text, number), row.line.numbers[number], step)] = None
            if rule.through is not None:
                copy, place = rule.through.place(old)
                for entry in self._series_at(rule.through, place):
                    found[Series(entry.path, entry.first + copy * entry.step, entry.step * rule.amount)] = None
        return tuple(found) or self._by_origin(fold)

    def _series_at(self, fold: Fold, place: int) -> tuple[Series, ...]:
        row = self.rows[fold.start + place]
        own = tuple(
            Series(path_before(row.text, number), row.line.numbers[number], step)
            for (at, number), step in fold.growth.items()
            if at == place and step and number < row.paths
        )
        return own or self._by_origin(fold)

    def _by_origin(self, fold: Fold) -> tuple[Series, ...]:
        blocks = []
        for copy in range(fold.copies):
            start = fold.start + copy * fold.length
            common = Counter(row.line.block for row in self.rows[start : start + fold.length]).most_common(1)[0][0]
            path, _, number = common.rpartition(".")
            if not number.isdigit():
                return ()
            blocks.append((path, int(number)))
        series = Series(blocks[0][0], blocks[0][1], blocks[1][1] - blocks[0][1])
        right = all(block == (series.path, series.first + copy * series.step) for copy, block in enumerate(blocks))
        return (series,) if right and series.step else ()


def _wrapped(text: str) -> list[str]:
    """A sentence, over several lines where it is long."""
    return textwrap.wrap(
        text,
        LINE_WIDTH,
        initial_indent="  ",
        subsequent_indent="  #   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _renumbered(numbers: dict[tuple[str, int], int]) -> list[str]:
    """``blocks.4..7 for blocks.0..3``: neighbouring numbers that move alike are said together."""
    runs: list[tuple[str, int, int, int]] = []  # path, first and last number, how much more each becomes
    for (path, old), new in sorted(numbers.items()):
        if runs and runs[-1][0] == path and runs[-1][2] == old - 1 and runs[-1][3] == new - old:
            runs[-1] = (path, runs[-1][1], old, new - old)
        elif new != old:
            runs.append((path, old, old, new - old))
    return [
        f"{path}.{first + more}..{last + more} for {path}.{first}..{last}"
        if last > first
        else f"{path}.{first + more} for {path}.{first}"
        for path, first, last, more in runs
    ]


def _due(sentences: dict[int, list[str]], line: int) -> list[str]:
    """Take out the sentences about folds that end before ``line``."""
    return [text for end in sorted(end for end in sentences if end <= line) for text in sentences.pop(end)]
