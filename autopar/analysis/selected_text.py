"""The lines of the text form that belong to a module, or match a pattern, each with its module and source line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import fx

from autopar.ir.node import Node, origin
from autopar.ir.program import AnyProgram, format_program
from autopar.ir.tables import Input
from autopar.ir.text import GradRule, Lines, aligned, input_text, origin_text
from autopar.mesh import Mesh

SCHEDULE = "schedule "  # begins the section that has no lines of a graph
Line = tuple[str, str, str, str]  # name, expression, type, origin
Wanted = Callable[[str, Line], bool]  # (module, line) -> whether it is shown


def selected(program: AnyProgram, module: str | None = None, pattern: str | None = None) -> str:
    """The lines of ``program`` in ``module`` and those below it, that ``pattern``, a regular expression, finds.

    Raises ValueError for a module that makes nothing, a pattern that is none or matches nothing.
    """
    try:
        search = re.compile(pattern).search if pattern is not None else None
    except re.error as problem:
        raise ValueError(
            f"--grep {pattern}: this is no regular expression: {problem}\nWay out: all_gather."
        ) from problem
    if module is not None:
        _check_module(program, module)

    def wanted(where: str, line: Line) -> bool:
        inside = module is None or where == module or where.startswith(f"{module}.")
        return inside and (search is None or search(" = ".join(line[:2]) + f" : {line[2]}  # {line[3]}") is not None)

    text = format_program(program, origins=True, form=partial(SelectedLines, wanted=wanted))
    sections = [part for part in text.split("\n\n") if "\n" in part and not part.startswith(SCHEDULE)]
    if not sections:
        where = f" in module {module}" if module is not None else ""
        raise ValueError(
            f"no line matches {pattern!r}{where}\nWay out: autopar show MODEL prints the lines that there are."
        )
    return "\n\n".join(sections)


class SelectedLines(Lines):
    """Formats those lines of graphs that are ``wanted``; ``...`` stands for those between."""

    def __init__(self, mesh: Mesh, gradients: GradRule | None, origins: bool, wanted: Wanted) -> None:
        super().__init__(mesh, gradients, origins)
        self.wanted = wanted
        self.targets: dict[str, str] = {}  # placeholder of any graph -> what it is in the model

    def section(
        self, heading: str, graph: fx.Graph, inputs: Sequence[Input | str | None], labels: Sequence[str]
    ) -> str:
        """The heading, and the lines below it; the heading alone where there are none."""
        names = frozenset(node.name for node in graph.nodes)
        given = iter([*inputs, *[None] * len(names)])
        found: list[tuple[int, Line]] = []
        for place, node in enumerate(graph.nodes):
            if node.op == "output":
                continue
            entry = next(given) if node.op == "placeholder" else None
            line = self._line(node, entry, names)
            if self.wanted(self._module(node, entry), line):
                found.append((place, line))
        lines, last = [heading], -1
        for (place, _), text in zip(found, aligned([line for _, line in found])):
            lines += ["  ..."] if place > last + 1 else []
            lines.append(text)
            last = place
        return "\n".join(lines)

    def _line(self, node: Node, entry: Input | str | None, names: frozenset[str]) -> Line:
        kind = entry.kind if isinstance(entry, Input) else None
        text = input_text(entry, node) if node.op == "placeholder" else self.expression(node, names)
        return node.name, text, self.types(node, kind), origin_text(node)

    def _module(self, node: Node, entry: Input | str | None) -> str:
        """Of a parameter the module that has it; of a saved one too."""
        if isinstance(entry, Input):
            self.targets[node.name] = entry.target
        if node.op == "placeholder" and node.name in self.targets:
            return self.targets[node.name]
        return origin(node).module


def _check_module(program: AnyProgram, module: str) -> None:
    paths = {origin(node).module for node in program.graph.nodes} | {entry.target for entry in program.inputs}
    parts = {".".join(path.split(".")[:length]) for path in paths for length in range(1, path.count(".") + 2)}
    if module not in parts:
        near = difflib.get_close_matches(module, sorted(parts), 3, 0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(
            f"the program computes nothing in a module '{module}'{hint}\nWay out: --module with one of its modules."
        )
