"""The rows of a graph in print: one for each node, and one for each item that it returns, as the fold compares them.

A row's own content (operator, constants, types) is separated from names and from numbers in the paths of modules. A
parameter that only enters an axis, or is only gathered, and the parts of a tuple have no rows of their own.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from autopar.analysis.fold import Line
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of
from autopar.ir.node import Node, values
from autopar.ir.tables import Input, InputKind
from autopar.ir.text import Lines, argument_text, input_text, operator_name, origin_text, type_text

NUMBERS = re.compile(r"(?<![^.])\d+(?![^.=])")  # those in the paths of modules
WORDS = re.compile(r'"(?:\\.|[^"\\])*"|(?<![\w.])[A-Za-z_]\w*(?![\w.=(])')  # a text in quotes, or a name


@dataclass(frozen=True)
class Row:
    """One line to be: of a node, or an item of what is returned."""

    line: Line
    node: Node | None
    text: str
    kind: str = ""
    where: str = ""
    paths: int = 0  # so many of its numbers, the first ones, are in paths of modules
    border: str = ""  # what it receives from, or sends to, another stage

    @property
    def pattern(self) -> Hashable:
        """Its key; of an item that is returned without that of the row it refers to."""
        return self.line.key if self.node is not None or not self.line.refs else self.line.key[:2]  # type: ignore[index]


class Rows:
    """The rows of one graph, in the order of its text. ``paths``: what inputs are of the model, by their names; those
    of the forward graph are known by name again where the backward graph has them as saved ones."""

    def __init__(
        self,
        form: Lines,
        paths: dict[str, str],
        graph: fx.Graph,
        inputs: Sequence[Input | str | None],
        labels: Sequence[str],
    ) -> None:
        self.form, self.paths = form, paths
        self.names = frozenset(node.name for node in graph.nodes)
        self.journeys = _journeys(graph)
        self.parts = {node: _shown(node) for node in graph.nodes if _is_part(form, node)}
        self.shown = self.parts | {node: first.name for first, journey in self.journeys.items() for node in journey}
        self.stands_for = {node.name: text for node, text in self.shown.items()}
        self.position: dict[Node, int] = {}
        self.rows: list[Row] = []
        self._read(graph, inputs, labels)

    def _read(self, graph: fx.Graph, inputs: Sequence[Input | str | None], labels: Sequence[str]) -> None:
        given = iter([*inputs, *[None] * len(self.names)])
        for node in graph.nodes:
            if node.op == "output":
                self._read_returned(node, labels)
                continue
            entry = next(given) if node.op == "placeholder" else None
            if node in self.shown:
                source = node.args[0]
                assert isinstance(source, Node)
                self.position[node] = self.position[source]
                continue
            self.position[node] = len(self.rows)
            self.rows.append(self._input_row(node, entry) if node.op == "placeholder" else self._row(node))

    def _input_row(self, node: Node, entry: Input | str | None) -> Row:
        text = input_text(entry, node)
        kind = self.form.types(node, entry.kind if isinstance(entry, Input) else None)
        kind += "".join(f" -> {self._journey_text(step)}" for step in self.journeys.get(node, ()))
        named = isinstance(entry, Input) and entry.kind is InputKind.INPUT
        pattern, numbers = _path_pattern(f"{text} {node.name}" if named else text)
        if isinstance(entry, Input):
            self.paths[node.name] = entry.target
        block = _block_in(self.paths[node.name]) if node.name in self.paths else block_of(node)
        line = Line(("placeholder", pattern, kind), (), numbers, block, kind=0, named=bool(numbers))
        received = text.startswith("grad ") or isinstance(entry, Input) and entry.kind is InputKind.RECEIVED
        return Row(line, node, text, kind, self._where(node), len(numbers), text if received else "")

    def _journey_text(self, node: Node) -> str:
        return (
            self._renamed(self.form.expression(node, self.names))
            .removeprefix("comm.")
            .replace(f"{self.shown[node]}, ", "", 1)
        )

    def _row(self, node: Node) -> Row:
        refs, numbers = [], []

        def key_of(value: Any) -> Any:
            if isinstance(value, Node):
                refs.append(self.position[value])
                return ("line", value.args[1] if value in self.parts else "")
            if isinstance(value, int) and not isinstance(value, bool):
                numbers.append(value)
                return ("number",)
            return value

        arguments = map_aggregate(node.args, key_of)
        options = map_aggregate(node.kwargs, key_of)
        kind = self.form.types(node, None)
        target = f"attr {node.target}" if node.op == "get_attr" else operator_name(node.target)
        key = (target, repr(arguments), repr(options), kind)
        line = Line(key, tuple(refs), tuple(numbers), block_of(node), kind=1)
        return Row(line, node, self._renamed(self.form.expression(node, self.names)), kind, self._where(node))

    def _read_returned(self, node: Node, labels: Sequence[str]) -> None:
        returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
        for label, value in zip([*labels, *[""] * (len(returned) - len(labels))], returned):
            pattern, numbers = _path_pattern(label)
            text = f"{label}{self._renamed(argument_text(value, self.names))}"
            if isinstance(value, Node):
                block = _block_in(label.rstrip("=")) or block_of(value)
                at = self.position[value]
                line = Line(("return", pattern, self.rows[at].line.key), (at,), numbers, block, kind=2)
            else:
                line = Line(("return", text), kind=2)
            border = label.rstrip("=") if label.startswith("send ") else ""
            self.rows.append(Row(line, None, text, paths=len(numbers), border=border))

    def _renamed(self, text: str) -> str:
        return WORDS.sub(lambda match: self.stands_for.get(match[0], match[0]), text)

    def _where(self, node: Node) -> str:
        return origin_text(node) if self.form.origins else ""


def _journeys(graph: fx.Graph) -> dict[Node, list[Node]]:
    """Placeholders whose one use is to enter an axis, or to be gathered: what happens to them first."""
    found: dict[Node, list[Node]] = {}
    for first in graph.nodes:
        node, journey = first, []
        while first.op == "placeholder" and len(node.users) == 1:
            (user,) = node.users
            row = comm.COLLECTIVES.get(comm.TARGETS.get(user.target, ""))
            if row is None or row.after != "R" or user.args[0] is not node:
                break
            node = user
            journey.append(node)
        if journey and not any(user.op == "output" for user in node.users):
            found[first] = journey
    return found


def _is_part(form: Lines, node: Node) -> bool:
    """Whether ``node`` is a part of a tuple that is only used within the graph."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int) or node.kwargs:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    kinds = [type_text(value) for value in values(source)]
    number = node.args[1]
    same = -len(kinds) <= number < len(kinds) and form.types(node, None) == kinds[number]
    return same and not any(user.op == "output" for user in node.users)


def _source_name(node: Node) -> str:
    source = node.args[0]
    assert isinstance(source, Node)
    return source.name


def _shown(node: Node) -> str:
    return f"{_source_name(node)}[{node.args[1]}]"


def _path_pattern(text: str) -> tuple[str, tuple[int, ...]]:
    """A text with the numbers of its module paths taken out, and these."""
    return NUMBERS.sub("#", text), tuple(int(number) for number in NUMBERS.findall(text))


def path_before(text: str, number: int) -> str:
    """The path in front of the ``number``-th number of a text: ``blocks`` of ``param blocks.0.up.weight``."""
    match = list(NUMBERS.finditer(text))[number]
    return text[: match.start() - 1].rpartition(" ")[2].strip('"')


def _block_in(target: str) -> str:
    match = NUMBERS.search(target)
    return target[: match.end()] if match else target
