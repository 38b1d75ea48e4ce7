"""Memory in the code of a rank: nothing is written where somebody may still read, or where a collective is under way.

    add = aten_add_(mm, x)                  refused where ``mm``, a view of it, or an input lives on
    start = comm.start_all_reduce(add, "dp")
    add_1 = aten_mul_(add, 2)               refused: the collective reads ``add`` until it is waited for
    sum = aten_sum(start)                   refused: its result is there after ``comm.wait``
    s = comm.all_reduce(mm, "dp", in_place=True)    writes into ``mm``: nobody may read that from here on

Two variables may share memory where the schema of an operator says that it returns a view; what is composed of other
operators, and may or may not copy (``reshape``), is taken to share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autopar.ir import collectives as comm
from autopar.ir.operator_facts import is_composite, is_overload, is_view, writes
from autopar.mesh import Mesh
from autopar.proof.rank_lines import Code, Line, axis_of
from autopar.proof.refusal import Layer, Refusal

POSITION = "axis_index"  # which a communicator makes once and keeps


def check_memory(code: Code, mesh: Mesh) -> Iterator[Refusal]:
    """What is wrong with the memory of the variables of one function."""
    walk = _Walk(code, mesh)
    for line in code.lines:
        yield from walk.step(line)
    yield from walk.end()


class _Walk:
    """The function, line by line: which memory each variable may be in, and which collectives are under way."""

    def __init__(self, code: Code, mesh: Mesh) -> None:
        self.code, self.mesh = code, mesh
        self.memory: dict[str, frozenset[str]] = {}
        self.users: dict[str, set[str]] = {}  # memory -> the variables that may be in it
        for name in code.inputs:
            self._keep(name, frozenset([name]))
        self.given = frozenset([*code.inputs, POSITION])  # memory that is not the function's own
        self.under_way: dict[str, tuple[Line, frozenset[str]]] = {}  # result of a start -> what must not be written
        self.last: dict[str, int] = {}  # variable -> the number of the last line that reads it
        for position, line in enumerate(code.lines):
            self.last |= dict.fromkeys(line.reads, position)
        self.last |= dict.fromkeys(code.returned, len(code.lines))
        self.position = -1

    def step(self, line: Line) -> Iterator[Refusal]:
        self.position += 1
        for name in dict.fromkeys((*line.reads, *line.deleted)):
            if name not in self.memory:
                yield self._refused(line, f"'{name}' has no value here", "it is deleted, or made, at another line")
                self._keep(name, frozenset([name]))
        if line.collective == "wait":
            yield from self._wait(line)
        else:
            yield from self._unfinished(line)
            if _writes(line):
                yield from self._write(line)
        for name in line.deleted:
            self._forget(name)
        for name in line.results:
            if name in self.under_way:
                yield self._refused(line, f"'{name}' is written anew before its collective has ended", "wait for it")
            self._keep(name, self._memory_of(line, name))
        if line.collective in comm.STARTED:
            self.under_way[line.results[0]] = line, self._of(line.reads)

    def end(self) -> Iterator[Refusal]:
        for line, _ in self.under_way.values():
            yield self._refused(line, "nothing waits for it", "a wait was dropped: its result may be there or not")
        for name in self.code.returned:
            if name not in self.memory:
                cause = "it is deleted before the end"
                yield Refusal(Layer.STRUCTURE, f"{self.code.name}: return", f"'{name}' has no value here", cause)

    def _keep(self, name: str, memory: frozenset[str]) -> None:
        self._forget(name)
        self.memory[name] = memory
        for each in memory:
            self.users.setdefault(each, set()).add(name)

    def _forget(self, name: str) -> None:
        for each in self.memory.pop(name, frozenset()):
            self.users[each].discard(name)

    def _wait(self, line: Line) -> Iterator[Refusal]:
        name = line.reads[0] if line.reads else ""
        started = self.under_way.pop(name, None)
        if started is None:
            yield self._refused(line, f"no collective that gives '{name}' is under way", "it was never started")
        elif axis_of(started[0]) != axis_of(line):
            problem = f"it waits over {axis_of(line)} for {started[0].collective} over {axis_of(started[0])}"
            yield self._refused(line, problem, "the group of the wait is not that of the start")

    def _unfinished(self, line: Line) -> Iterator[Refusal]:
        """Reads of what a collective has yet to give, or is writing over."""
        for started, busy in self.under_way.values():
            for name in line.reads if _writes(started) else ():
                if self._of((name,)) & busy and name not in self.under_way:
                    problem = f"it reads '{name}', which {started.collective} (line {started.number}) is writing over"
                    yield self._refused(line, problem, "its memory is used again before the wait")
        for name in line.reads:
            if name in self.under_way:
                started = self.under_way[name][0]
                problem = f"it reads '{name}', which {started.collective} (line {started.number}) has yet to give"
                yield self._refused(line, problem, "a wait is missing, or stands too late")

    def _write(self, line: Line) -> Iterator[Refusal]:
        written = self._of(line.reads[:1])
        if shared := written & self.given:
            cause = "parameters, inputs and saved values are not the function's own"
            yield self._refused(line, f"it writes into the memory of the input '{min(shared)}'", cause)
        for started, busy in self.under_way.values():
            if written & busy:
                problem = f"it writes into what {started.collective} (line {started.number}) is still reading"
                yield self._refused(line, problem, "its memory is used again before the wait")
        for name in sorted(set[str]().union(*(self.users.get(each, ()) for each in written))):
            if self.last.get(name, -1) > self.position and name not in line.results:
                problem = f"it writes into the memory of '{name}', which a later line reads"
                yield self._refused(line, problem, "its memory is used again too early")

    def _of(self, names: tuple[str, ...]) -> frozenset[str]:
        return frozenset[str]().union(*(self.memory.get(name, frozenset()) for name in names))

    def _memory_of(self, line: Line, name: str) -> frozenset[str]:
        own = frozenset([f"{name}@{line.number}"])
        if _writes(line):
            return self._of(line.reads[:1])
        if line.collective == "axis_index":
            return frozenset([POSITION])
        if line.collective:
            return own if self._is_new(line) else own | self._of(line.reads)
        if line.target is None or is_view(line.target):  # x[0] of several results; x + y shares nothing, and is rare
            return self._of(line.reads)
        return own if _allocates(line.target) else own | self._of(line.reads)

    def _is_new(self, line: Line) -> bool:
        """Whether a collective gives memory of its own; over one rank it may give its operand."""
        gives = line.collective in comm.STARTED or line.collective == "all_reduce"
        return gives and self.mesh.size(axis_of(line)) > 1

    def _refused(self, line: Line, problem: str, cause: str) -> Refusal:
        return Refusal(Layer.STRUCTURE, f"{self.code.name}, line {line.number}: {line.text}", problem, cause)


def _writes(line: Line) -> bool:
    """Whether a line writes into the first variable that it reads."""
    return bool(line.reads) and (writes(line.target) or line.given.get("in_place") == "True")


def _allocates(target: Any) -> bool:
    """Whether an operator certainly gives memory of its own."""
    if is_overload(target):
        return not is_composite(target, in_python=False) or target._schema.name == "aten::linear"
    return False
