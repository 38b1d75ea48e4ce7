"""What differs between two programs of one model: on two meshes, with two plans, or before and after a change.

    parameters  blocks.*.up.weight   x 4   f32[32,8] -> f32[32@tp,8]
    values      blocks.* aten.linear x 8   f32[4@dp,32] -> f32[4@dp,32@tp]
    sent        forward   tp  all_reduce   0 -> 8 times   0 -> 16.4 kB

Tensors are compared by their names in the model, values by the module and operator that make them, collectives by phase
and group. What is the same in the blocks of a series, whose numbers are in the paths of modules, is one line.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from autopar.analysis.footprint import held, sent
from autopar.analysis.peak import peak
from autopar.errors import check_kind
from autopar.ir import collectives as comm
from autopar.ir.node import origin, values
from autopar.ir.operator_facts import is_view
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.ir.text import operator_name, type_text
from autopar.ir.traffic import size_text
from autopar.mesh import PIPELINE

NUMBER = re.compile(r"(?<![^.])\d+(?![^. ])")  # in a path, with an operator after it or not
ABSENT = "(none)"
KINDS = {InputKind.PARAMETER: "parameters", InputKind.BUFFER: "buffers", InputKind.INPUT: "inputs"}
MOST_LINES = 40  # of one kind, as text


@dataclass(frozen=True)
class Change:
    """``count`` things of one ``kind`` and ``name`` that were ``before`` and are ``after``; "(none)": there is none."""

    kind: str
    name: str
    count: int
    before: str
    after: str


@dataclass(frozen=True)
class Amount:
    """A number of bytes, or of operations, that differs: of one rank in one step."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Difference:
    """What differs between two programs; ``str`` of it is for people, :meth:`to_json` for other programs.

    Attributes:
        choices: of mesh and plan.
        layouts: of parameters, buffers, inputs, outputs, and of the values of the forward pass.
        operations: collectives in the graphs (of all stages), by phase, group, name and the modules they belong to.
        sent: bytes that the rank sends that sends most.
        memory: bytes that a rank holds.
    """

    choices: tuple[Change, ...]
    layouts: tuple[Change, ...]
    operations: tuple[Amount, ...]
    sent: tuple[Amount, ...]
    memory: tuple[Amount, ...]

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return any((self.choices, self.layouts, self.operations, self.sent, self.memory))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self:
            return "the programs are laid out alike, send and hold the same"
        sections = [
            ("mesh and plan", [_changed(one) for one in self.choices]),
            ("layouts", [_changed(one) for one in self.layouts]),
            ("collectives in the graphs", [_amount(one, str) for one in self.operations]),
            ("sent by rank 0 in a step", [_amount(one, size_text) for one in self.sent]),
            ("held by one rank", [_amount(one, size_text) for one in self.memory]),
        ]
        return "\n\n".join("\n".join([title, *_columns(rows)]) for title, rows in sections if rows)


def diff(before: AnyProgram, after: AnyProgram) -> Difference:
    """The difference of two programs of one model, each as far as it is compiled; nothing is run."""
    for name, program in (("before", before), ("after", after)):
        check_kind(name, program, Program | PipelinedProgram, "compile_program(...), or Program.load(DIR)")
    return Difference(
        tuple(_choices(before, after)),
        tuple(_layouts(before, after)),
        tuple(_amounts(_collectives(before), _collectives(after))),
        tuple(_amounts(_sent(before), _sent(after))),
        tuple(_amounts(_memory(before), _memory(after))),
    )


# ---------------------------------------------------------------- what differs


def _choices(before: AnyProgram, after: AnyProgram) -> Iterator[Change]:
    for kind, one, other in (
        ("mesh", dict(before.mesh.axes), dict(after.mesh.axes)),
        ("plan", before.plan.to_json(), after.plan.to_json()),
    ):
        for name in dict.fromkeys((*one, *other)):
            texts = [str(side.get(name, ABSENT)) for side in (one, other)]
            if texts[0] != texts[1]:
                yield Change(kind, name, 1, *texts)


def _layouts(before: AnyProgram, after: AnyProgram) -> Iterator[Change]:
    for kind in (*KINDS.values(), "outputs", "values"):
        yield from _folded(kind, _types(before, kind), _types(after, kind))


def _types(program: AnyProgram, kind: str) -> dict[tuple[str, int], str]:
    """(name, how many of that name came before) -> type, with its layout."""
    if kind == "outputs":
        named = [
            (entry.target, node) for node, entry in zip(program.returned, program.outputs)
            if entry.kind is OutputKind.USER
        ]  # fmt: skip
    elif kind == "values":
        calls = (node for node in program.graph.nodes if node.op == "call_function")
        named = [(_maker(node), node) for node in calls if not _arranges(node)]
    else:
        (wanted,) = (one for one, name in KINDS.items() if name == kind)
        named = [(entry.target, node) for node, entry in program.placeholders(wanted)]
    found: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for name, node in named:
        found[name, seen[name]] = ", ".join(type_text(one) for one in values(node))
        seen[name] += 1
    return found


def _arranges(node: fx.Node) -> bool:
    """Collectives, views and parts of tuples: what they give follows from what they take."""
    return node.target in comm.TARGETS or node.target is operator.getitem or is_view(node.target)


def _maker(node: fx.Node) -> str:
    return f"{origin(node).module or '(model)'} {operator_name(node.target)}"


def _series(path: str) -> str:
    """A path without its first number, which says which of a series of blocks it is: ``blocks.*.0.weight``."""
    return NUMBER.sub("*", path, count=1)


def _folded(kind: str, before: Mapping[tuple[str, int], str], after: Mapping[tuple[str, int], str]) -> list[Change]:
    """The entries that differ, those of a series of blocks together; in the order of the first program."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for key in dict.fromkeys((*before, *after)):
        one, other = before.get(key, ABSENT), after.get(key, ABSENT)
        if one != other:
            counts[_series(key[0]), one, other] += 1
    return [Change(kind, name, count, one, other) for (name, one, other), count in counts.items()]


def _collectives(program: AnyProgram) -> Counter[str]:
    """How many collectives the graphs of all stages have: by phase, group, name and series of modules."""
    found: Counter[str] = Counter()
    for part in program.parts:
        role = part.role
        graphs = {"forward": part.graph} if role is None else {"forward": role.forward, "backward": role.backward}
        for phase, graph in graphs.items():
            for node in graph.nodes if graph is not None else ():
                name = comm.moving(node.target)
                if name is not None and not comm.is_idle(node, part.mesh):
                    axis, where = comm.arguments_of(node)["axis"], _series(origin(node).module)
                    found[f"{phase} {axis} {name} {where or '(model)'}"] += 1
    return found


def _sent(program: AnyProgram) -> dict[str, int]:
    """Bytes by phase, group and name, of the pipeline rank that sends most."""
    found: dict[str, int] = {}
    ranks = program.mesh.group(0, PIPELINE) if isinstance(program, PipelinedProgram) else (0,)
    for rank in ranks:
        for one in sent(program, rank):
            key = f"{one.phase} {one.axis} {one.name}"
            found[key] = max(found.get(key, 0), one.bytes)
    return found


def _memory(program: AnyProgram) -> dict[str, int]:
    found = {"parameters": held(program).rank}
    if isinstance(program, Program) and program.role is not None:
        most = peak(program)
        found |= {"kept for backward": most.kept, "most in forward": most.forward, "most in backward": most.backward}
    return found


def _amounts(before: Mapping[str, int], after: Mapping[str, int]) -> Iterator[Amount]:
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name, 0), after.get(name, 0)
        if one != other:
            yield Amount(name, one, other)


# ---------------------------------------------------------------- as text


def _changed(one: Change) -> tuple[str, ...]:
    times = f"x {one.count}" if one.count > 1 else ""
    return one.kind, one.name, times, f"{one.before} -> {one.after}"


def _amount(one: Amount, text: Any) -> tuple[str, ...]:
    before, after = text(one.before), text(one.after)
    if before == after:  # but for digits that are not printed
        before, after = f"{one.before:,} B", f"{one.after:,} B"
    return one.name, f"{before} -> {after}"


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    hidden = len(rows) - MOST_LINES
    shown = rows if hidden <= 0 else rows[:MOST_LINES]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
    return [*lines, f"  and {hidden} more; all of them: autopar diff --json"] if hidden > 0 else lines
