"""The reader of one graph of the text form: lines ``name = expression : type`` up to ``return ...``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.errors import ProgramFileError
from autopar.ir import collectives as comm
from autopar.ir import text
from autopar.ir.cursor import MOST_LETTERS, STRING, WORD, Cursor, listed, take_axis, take_layout
from autopar.ir.layout import Layout
from autopar.ir.loadable_operators import EVERY, misfit, why_not
from autopar.ir.node import Node, Origin, Value, set_origin, set_values
from autopar.ir.operator_facts import argument_names
from autopar.ir.tables import Input, InputKind, OutputKind
from autopar.mesh import Mesh
from autopar.operators.registry import REGISTRY

NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?", re.ASCII)
NEGATIVE_INFINITY = re.compile(r"-inf\b")
OPERATOR = re.compile(r"[A-Za-z_]\w*(\.\w+){1,2}(?=\()", re.ASCII)
INDEXED = re.compile(r"[A-Za-z_]\w*(?=\[)", re.ASCII)
CALL = re.compile(r"(slice|device)(?=\()")
IN_TORCH = re.compile(r"torch\.\w+", re.ASCII)
KEYWORD = re.compile(r"[A-Za-z_]\w*(?=\s*=)", re.ASCII)
RETURN = re.compile(r"return\b(?!\s*=)")
LABEL = re.compile(rf"(?:[A-Za-z0-9_.]+|{STRING.pattern})(?=\s*=)", re.ASCII)
MARKED = {  # the word before the name of an output that is not the user's
    OutputKind.BUFFER_UPDATE: re.compile(r"update\s+(?=[^\s=,])"),
    OutputKind.SENT: re.compile(r"send\s+(?=[^\s=,])"),
}
SAVED_VALUE = re.compile(r"saved\s+(?=[^\s=,])")

LITERALS = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}
TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
INPUT_KINDS = {kind.value: kind for kind in InputKind}
SAVED = "saved"
Marked = tuple[torch.dtype, Layout, str]  # the last: "", " grad" or " nograd"


@dataclass
class Section:
    """The content of one section of the text."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, Node] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    gradients: list[tuple[Cursor, str]] = field(default_factory=list)  # the outputs that `grad NAME` lines name
    labels: list[tuple[OutputKind | str, str]] = field(default_factory=list)  # (kind or SAVED, target) per result


class GraphReader:
    """Reads one section.

    ``gradients``: whether parameters, and values computed from them, require gradients unless marked otherwise.
    ``role``: whether this is a section of a role, where inputs may be ``saved`` values and gradients.
    ``operators``: of libraries, that the text may call (:func:`autopar.ir.loadable_operators.why_not`).
    """

    def __init__(
        self, mesh: Mesh, *, gradients: bool, role: bool, origins: bool, operators: Collection[str] = ()
    ) -> None:
        self.mesh, self.gradients, self.role, self.origins = mesh, gradients, role, origins
        self.operators = operators
        self.section = Section()

    def read(self, number: int, body: Sequence[tuple[int, str]]) -> Section:
        """``body``: the numbered lines under the heading at line ``number``. Raises ProgramFileError."""
        returned = False
        for number, line in body:
            cursor = Cursor(number, line)
            if returned:
                cursor.fail("nothing after 'return'")
            if cursor.take(RETURN):
                self._outputs(cursor)
                returned = True
            else:
                self._node(cursor)
        if not returned:
            raise ProgramFileError(f"line {number}: expected 'return ...' as the last line of the section")
        return self.section

    def _node(self, cursor: Cursor) -> None:
        start = cursor.at
        name = cursor.expect(WORD, "the name of a value")
        if name in self.section.nodes:
            cursor.fail("a name that is not defined above", name, start)
        cursor.expect_sign("=")
        node = self._expression(cursor, name)
        if node.name != name:
            cursor.fail(f"a name that is none of Python's own, e.g. '{node.name}'", name, start)
        comment = cursor.comment()
        if self.origins and comment:
            module, _, line = comment.partition("  ")
            set_origin(node, Origin("" if module == "-" else module, line.strip()))
        self.section.nodes[name] = node

    def _outputs(self, cursor: Cursor) -> None:
        """``return loss=a, update bn.mean=b, saved c``"""
        returned: list[Any] = []
        while cursor.more():
            if returned:
                cursor.expect_sign(",")
            marked = [kind for kind, mark in MARKED.items() if cursor.take(mark)]
            kind: OutputKind | str = marked[0] if marked else OutputKind.USER
            if not marked and self.role and cursor.take(SAVED_VALUE):
                kind = SAVED
            target = ""
            if kind is not SAVED and cursor.looking_at(LABEL):
                target = cursor.target("the name of an output")
                cursor.expect_sign("=")
            elif marked:
                cursor.fail("the name of a buffer and '='" if kind is OutputKind.BUFFER_UPDATE else "a name and '='")
            self.section.labels.append((kind, target))
            returned.append(self._argument(cursor))
        cursor.comment()
        self.section.graph.output(tuple(returned))

    # ------------------------------------------------------------ expressions

    def _expression(self, cursor: Cursor, name: str) -> Node:
        graph, start = self.section.graph, cursor.at
        indexed = cursor.take(INDEXED)
        if indexed is not None:
            source = self._defined(cursor, indexed, start)
            cursor.expect_sign("[")
            index = self._argument(cursor)
            cursor.expect_sign("]")
            return self._typed(cursor, graph.create_node("call_function", operator.getitem, (source, index), name=name))
        called = cursor.take(OPERATOR)
        if called is None:
            return self._placeholder(cursor, name)
        target = _operator(cursor, called, start, self.operators)
        if target in comm.TARGETS:
            return self._collective(cursor, target, name)
        cursor.expect_sign("(")
        args, kwargs = self._arguments(cursor)
        problem = misfit(target, len(args), kwargs)
        if problem is not None:
            cursor.fail(problem, called, start)
        return self._typed(cursor, graph.create_node("call_function", target, tuple(args), kwargs, name=name))

    def _placeholder(self, cursor: Cursor, name: str) -> Node:
        """``param NAME [also NAME, NAME]``, ``input [NAME]``, ...; in a role also ``saved`` and ``grad OUTPUT``."""
        start = cursor.at
        word = cursor.take(WORD)
        kind = INPUT_KINDS.get(word or "")
        if kind is not None:
            unnamed = kind in (InputKind.INPUT, InputKind.SEED) and not (cursor.more() and not cursor.next_is(":"))
            target = name if unnamed else cursor.target(f"the name of the {word}")
            aliases = []
            if cursor.take(re.compile(r"also\b")):
                aliases.append(cursor.target("a further name of the parameter"))
                while cursor.sign(","):
                    aliases.append(cursor.target("a further name of the parameter"))
            self.section.inputs.append(Input(name, kind, target, tuple(aliases)))
        elif self.role and word == "grad":
            at = cursor.take(re.compile(r"at (?=\d)"))
            output = f"at {cursor.expect_number('a position')}" if at else text.quoted(cursor.target("an output"))
            self.section.gradients.append((cursor, output))
        elif not (self.role and word == SAVED):
            kinds = f"{', '.join(INPUT_KINDS)}{', saved, grad' if self.role else ''}"
            cursor.fail(f"an operator such as 'aten.add.Tensor(', or one of {kinds}", None, start)
        node = self.section.graph.create_node("placeholder", name, name=name)
        return self._typed(cursor, node, kind)

    def _collective(self, cursor: Cursor, target: Any, name: str) -> Node:
        """``comm.all_gather(x, tp, dim=1)``; arguments that the line leaves out follow from the mesh and the type."""
        start = cursor.at
        parameters = argument_names(target)
        positions = iter(parameters)
        given: dict[str, Any] = {}
        cursor.expect_sign("(")

        def item() -> None:
            keyword = cursor.take(KEYWORD)
            if keyword is not None:
                cursor.expect_sign("=")
            parameter = keyword or next(positions, "")
            if parameter not in parameters or parameter in given:
                cursor.fail(f"')' or one of {', '.join(p for p in parameters if p not in given)}", parameter or None)
            given[parameter] = self._comm_argument(cursor, parameter)

        listed(cursor, ")", item)
        types = self._types(cursor)
        layouts = [layout for _, layout, _ in types]
        if "axis" in given:
            given = {**text.implied_arguments(comm.TARGETS[target], given, self.mesh, layouts), **given}
        missing = [parameter for parameter in parameters if parameter not in given]
        if missing:
            cursor.fail(f"argument {missing[0]}= of {text.operator_name(target)}", ")", start)
        args = tuple(given[parameter] for parameter in parameters)
        node = self.section.graph.create_node("call_function", target, args, name=name)
        return self._with_values(node, types)

    def _comm_argument(self, cursor: Cursor, parameter: str) -> Any:
        if parameter == "axis":
            return take_axis(cursor, self.mesh)
        if parameter == "op":
            return cursor.expect(WORD, "a reduction: sum, max, ...")
        if parameter in ("source", "target") and not cursor.next_is("["):
            return [cursor.expect_number("a dim, or [dim, outer, ratio...]"), 1, 1]
        return self._argument(cursor)

    # ------------------------------------------------------------ arguments

    def _arguments(self, cursor: Cursor) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}

        def item() -> None:
            keyword = cursor.take(KEYWORD)
            if keyword is not None:
                cursor.expect_sign("=")
                kwargs[keyword] = self._argument(cursor)
            elif kwargs:
                cursor.fail("a keyword argument: others cannot follow one")
            else:
                args.append(self._argument(cursor))

        listed(cursor, ")", item)
        return args, kwargs

    def _argument(self, cursor: Cursor) -> Any:
        if cursor.sign("["):
            return listed(cursor, "]", lambda: self._argument(cursor))
        if cursor.sign("("):
            return tuple(listed(cursor, ")", lambda: self._argument(cursor)))
        if cursor.take(NEGATIVE_INFINITY):
            return -math.inf
        at, number = cursor.at, cursor.take(NUMBER)
        if number is not None:
            is_float = "." in number or "e" in number
            if not is_float and len(number) > MOST_LETTERS:
                cursor.fail(f"a number of at most {MOST_LETTERS} letters", number[:20], at)
            return float(number) if is_float else int(number)
        quoted = cursor.string()
        if quoted is not None:
            return quoted
        start, call = cursor.at, cursor.take(CALL)
        if call is not None:
            cursor.expect_sign("(")
            parts = listed(cursor, ")", lambda: self._argument(cursor))
            return self._built(cursor, call, parts, start)
        constant = cursor.take(IN_TORCH)
        if constant is not None:
            found = getattr(torch, constant[6:], None)
            return found if isinstance(found, TORCH_CONSTANTS) else cursor.fail("a constant of torch", constant, start)
        return self._word(cursor, cursor.expect(WORD, "an argument"), start)

    def _word(self, cursor: Cursor, word: str, start: int) -> Any:
        if word in self.section.nodes:
            return self.section.nodes[word]
        if word in LITERALS:
            return LITERALS[word]
        return text.DTYPES[word] if word in text.DTYPES else self._defined(cursor, word, start)

    def _defined(self, cursor: Cursor, name: str, start: int) -> Node:
        if name not in self.section.nodes:
            cursor.fail("a value that is defined above", name, start)
        return self.section.nodes[name]

    def _built(self, cursor: Cursor, call: str, parts: list[Any], start: int) -> Any:
        if call == "slice" and len(parts) == 3:
            return slice(*parts)
        try:
            return torch.device(*parts) if call == "device" else cursor.fail("slice(start, stop, step)", "", start)
        except (RuntimeError, TypeError):
            return cursor.fail('a device, e.g. device("cuda:0")', str(parts), start)

    # ------------------------------------------------------------ types

    def _typed(self, cursor: Cursor, node: Node, kind: InputKind | None = None) -> Node:
        return self._with_values(node, self._types(cursor), kind)

    def _types(self, cursor: Cursor) -> list[Marked]:
        if not cursor.sign(":"):
            return []
        return listed(cursor, ")", lambda: self._type(cursor)) if cursor.sign("(") else [self._type(cursor)]

    def _type(self, cursor: Cursor) -> Marked:
        start, name = cursor.at, cursor.expect(WORD, "a type, e.g. f32[4@dp,16]")
        if name not in text.DTYPES:
            cursor.fail(f"a dtype ({', '.join(text.DTYPES)})", name, start)
        layout = take_layout(cursor, self.mesh)
        mark = cursor.take(re.compile(r"(no)?grad\b"))
        return text.DTYPES[name], layout, mark or ""

    def _with_values(self, node: Node, types: Sequence[Marked], kind: InputKind | None = None) -> Node:
        found = []
        for position, (dtype, layout, mark) in enumerate(types):
            usual = self.gradients and text.grad_by_default(kind, node, Value(dtype, layout), position)
            found.append(Value(dtype, layout, mark == "grad" if mark else usual))
        if found:
            set_values(node, *found)
        return node


def parse_argument(source: str) -> Any:
    """The inverse of ``text.argument_text`` for values that are no nodes. Raises ProgramFileError."""
    cursor = Cursor(1, source)
    value = GraphReader(Mesh(), gradients=False, role=False, origins=False)._argument(cursor)
    cursor.comment()
    return value


def operator_named(name: str, allowed: Collection[str] = EVERY) -> Any:
    """The inverse of ``text.operator_name``. Raises ProgramFileError."""
    return _operator(Cursor(1, name), name, 0, allowed)


def _operator(cursor: Cursor, name: str, start: int, allowed: Collection[str]) -> Any:
    """The registered operator called ``name``, one that may be called; the text can call nothing else."""
    namespace, _, rest = name.partition(".")
    if namespace == "comm":
        if rest not in comm.NAMES:
            cursor.fail(f"a collective ({', '.join(comm.NAMES)})", name, start)
        return getattr(comm.OPS, rest).default
    if namespace == "op":
        if rest not in REGISTRY:
            cursor.fail("an operator of autopar.operators", name, start)
        return REGISTRY[rest]
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        cursor.fail("a registered operator (import the library that defines it first)", name, start)
    refused = why_not(found, allowed)
    if refused is not None:
        cursor.fail(f"an operator that a program may call ({refused})", name, start)
    return found
