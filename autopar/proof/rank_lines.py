"""The lines of the Python that a rank runs, read back from its text.

What a rank does is taken from the text itself, not from the graph that it was written from: so a fault of what writes
it shows too, and a rank whose text was changed by hand is judged by that text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from autopar.codegen.python import RESERVED
from autopar.codegen.torch_bindings import BINDINGS
from autopar.errors import ProofError
from autopar.ir import collectives as comm
from autopar.operators.registry import REGISTRY

_OVERLOADS = {text: target for target, text in BINDINGS.items()}
_FIRST = ("x", "axis", "op")  # arguments of a collective that stand without a name
_IMPORTS = ("import torch", "import math", "import operator", "from autopar import operators as op")


@dataclass(frozen=True)
class Line:
    """One statement ``results = call(...)`` of a rank's function.

    Attributes:
        text: as it is written, without indentation.
        type: what its comment says of the result: ``f32[2@dp,8]``.
        results: the variables that it gives a value.
        reads: the variables that it reads, in order; those of a first list too.
        target: the operator that it calls; None for what is no call (``x[0]``, ``a + b``).
        collective: the name of the collective that it calls, "" for none.
        given: the arguments of a collective by name, as text.
        deleted: the variables that end with it.
    """

    number: int
    text: str
    type: str = ""
    results: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    target: Any = None
    collective: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Code:
    """A function of a rank's code: ``inputs`` are the variables that it takes, ``returned`` those that it gives."""

    name: str
    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    returned: tuple[str, ...]

    def collectives(self) -> Iterator[Line]:
        """The lines that send data, in order."""
        for line in self.lines:
            if line.collective and comm.moving(getattr(comm.OPS, line.collective).default) is not None:
                yield line


def axis_of(line: Line) -> str:
    """The axis of a collective."""
    return line.given["axis"].strip("'\"")


def read_code(source: str) -> dict[str, Code]:
    """The functions in an emitted module by name. Raises ProofError for text that is no such module."""
    try:
        module = ast.parse(source)
    except SyntaxError as problem:
        raise ProofError(f"the code of a rank is no Python: {problem}\nWay out: emit it again.") from problem
    texts = source.splitlines()
    names: dict[str, str] = {}
    functions: list[ast.FunctionDef] = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.args.defaults:
            functions.append(node)
        elif _binds(node):
            names |= {node.targets[0].id: ast.unparse(node.value)}  # type: ignore[attr-defined]
        elif ast.unparse(node) not in _IMPORTS:
            raise ProofError(
                f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}: around its functions a rank's code has "
                "imports and names of operators only\nWay out: emit it again."
            )
    return {function.name: _read(function, names, texts) for function in functions}


def _binds(node: ast.stmt) -> bool:
    """Whether a statement gives an operator a name, ``aten_mm = torch.mm``, and changes nothing of torch."""
    if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.targets[0], ast.Name):
        return False
    return node.targets[0].id not in RESERVED and isinstance(node.value, ast.Attribute)


def _read(function: ast.FunctionDef, names: Mapping[str, str], texts: Sequence[str]) -> Code:
    inputs: tuple[str, ...] = ()
    lines: list[Line] = []
    returned: tuple[str, ...] = ()
    for statement in _statements(function.body):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.value) in ("inputs", "sizes"):
            inputs += _names(statement.targets[0])
        elif isinstance(statement, ast.Return):
            returned = _names(statement.value)
        elif isinstance(statement, ast.Delete):
            gone = tuple(name for target in statement.targets for name in _names(target))
            lines.append(Line(statement.lineno, f"del {', '.join(gone)}", deleted=gone))
        elif isinstance(statement, ast.Assign):
            lines.append(_line(statement, names, texts[statement.lineno - 1]))
        elif ast.unparse(statement) != "inputs.clear()":
            raise ProofError(
                f"{function.name}, line {statement.lineno}: {ast.unparse(statement)}: a rank's code has assignments, "
                "del and a return only\nWay out: emit it again."
            )
    return Code(function.name, inputs, tuple(lines), returned)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Those inside ``with comm.inside(...)`` too."""
    for statement in body:
        if isinstance(statement, ast.With) and ast.unparse(statement.items[0]).startswith("comm.inside("):
            yield from _statements(statement.body)
        else:
            yield statement


def _line(statement: ast.Assign, names: Mapping[str, str], text: str) -> Line:
    call = statement.value
    shown, _, comment = text.strip().partition("  # ")
    shown = shown.partition("; del ")[0]
    results, reads = _names(statement.targets[0]), tuple(_reads(call))
    if not isinstance(call, ast.Call):
        return Line(statement.lineno, shown, comment, results, reads)
    called = _dotted(call.func)
    if called.startswith("comm."):
        name = called.removeprefix("comm.")
        given = dict(zip(_FIRST, map(ast.unparse, call.args)))
        given |= {str(word.arg): ast.unparse(word.value) for word in call.keywords}
        return Line(statement.lineno, shown, comment, results, reads, None, name, given)
    reads = tuple(name for name in reads if name not in names)
    return Line(statement.lineno, shown, comment, results, reads, _target(names.get(called, called)))


def _names(target: ast.expr | None) -> tuple[str, ...]:
    if isinstance(target, ast.Tuple | ast.List):
        return tuple(name for element in target.elts for name in _names(element))
    return (target.id,) if isinstance(target, ast.Name) else ()


def _dotted(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return f"{_dotted(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ast.unparse(function)


def _reads(value: ast.expr) -> Iterator[str]:
    """The variables in an expression, without modules (``torch.float32``), functions and constants."""
    if isinstance(value, ast.Name):
        yield value.id
    elif isinstance(value, ast.Call):
        for argument in value.args:
            yield from _reads(argument)
        for word in value.keywords:
            yield from _reads(word.value)
    elif not isinstance(value, ast.Constant | ast.Attribute):
        for child in ast.iter_child_nodes(value):
            if isinstance(child, ast.expr):
                yield from _reads(child)


@cache
def _target(text: str) -> Any:
    """The operator that is called by ``text``, an overload where it is one of torch."""
    if text in _OVERLOADS:
        return _OVERLOADS[text]
    if text.startswith("torch.ops."):
        found: Any = torch.ops
        for part in text.split(".")[2:]:
            found = getattr(found, part)
        return found
    return REGISTRY.get(text.removeprefix("op."), text)
