"""The text form of graphs: deterministic ASCII, layouts inside types, read back by :mod:`autopar.ir.parse`.

    program mesh(dp=2 tp=2)
      w      = param up.weight : f32[32@tp,8]
      x      = input           : f32[4@dp,16,8]
      linear = aten.linear(x, w) : f32[4@dp,16,32@tp]
      return linear

Gradients: by default parameters of floating dtype require them, and so does what is computed from such values; a type
that differs is followed by ``grad`` or ``nograd``. ``nograd`` in the header: no value of the graph requires a gradient.
Sections ``forward:``, ``backward:``, ``inference:`` follow for each role once the program is differentiated; gradients
are computed explicitly there, so types say nothing about them. A pipelined program goes on with ``stage 0 of 2
mesh(...)`` and so on, each as a program, the ``schedule``, and a ``tail mesh(...)`` for smaller last microbatches. What
a microbatch adds to sums over the batch (:mod:`autopar.pipeline.microbatches`) has a ``counts mesh()`` of its own.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.cursor import PLAIN
from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, origin, values
from autopar.ir.sizes import is_expression
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.mesh import Mesh
from autopar.operators.registry import REGISTRY

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NAME_WIDTH, LINE_WIDTH = 28, 104  # columns are aligned up to these widths

GradRule = Callable[[InputKind | None, Node, Value, int], bool]


def input_text(entry: Input | str | None, node: Node) -> str:
    if entry is None or isinstance(entry, str):
        return entry or "input"
    unnamed = entry.kind in (InputKind.INPUT, InputKind.SEED) and entry.target == node.name
    target = "" if unnamed else f" {quoted(entry.target)}"
    also = f" also {', '.join(map(quoted, entry.aliases))}" if entry.aliases else ""
    return f"{entry.kind.value}{target}{also}"


def output_label(entry: Output) -> str:
    if entry.kind is not OutputKind.USER:
        return f"{entry.kind.value} {quoted(entry.target)}="
    return f"{quoted(entry.target)}=" if entry.target else ""


def grad_names(outputs: Sequence[Output]) -> list[str]:
    """The names of the gradients of outputs: their targets, or the position where a target is not unique."""
    uses = Counter(entry.target for entry in outputs)
    return [
        quoted(entry.target) if entry.target and uses[entry.target] == 1 else f"at {position}"
        for position, entry in enumerate(outputs)
    ]


def quoted(target: str) -> str:
    return target if PLAIN.fullmatch(target) else json.dumps(target)


def placeholders(graph: fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


# ---------------------------------------------------------------- gradients


def _floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def no_grad_by_default(kind: InputKind | None, node: Node, value: Value, position: int) -> bool:
    return False


def grad_by_default(kind: InputKind | None, node: Node, value: Value, position: int) -> bool:
    """Whether value number ``position`` of ``node`` requires a gradient if its line says nothing.

    Parameters (``kind`` is that of a placeholder) do, and so do values computed from values that do.
    """
    if not _floating(value.dtype):
        return False
    if node.op == "placeholder":
        return kind in (InputKind.PARAMETER, InputKind.RECEIVED)
    if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        whole = values(node.args[0])
        return whole[node.args[1]].requires_grad if node.args[1] < len(whole) else False
    return any(v.requires_grad for operand in node.all_input_nodes for v in values(operand))


def needs_gradients(graph: fx.Graph, inputs: Sequence[Input | None]) -> bool:
    """False if no value requires a gradient although a parameter would by default: the header then says so."""
    if any(value.requires_grad for node in graph.nodes for value in values(node)):
        return True
    kinds = (InputKind.PARAMETER, InputKind.RECEIVED)
    parameters = [n for n, e in zip(placeholders(graph), inputs) if e is not None and e.kind in kinds]
    return not any(_floating(value.dtype) for node in parameters for value in values(node))


# ---------------------------------------------------------------- lines


class Lines:
    """Formats graphs. ``gradients``: whether a value requires a gradient by default, None to leave gradients out."""

    def __init__(self, mesh: Mesh, gradients: GradRule | None, origins: bool) -> None:
        self.mesh, self.gradients, self.origins = mesh, gradients, origins

    def section(
        self, heading: str, graph: fx.Graph, inputs: Sequence[Input | str | None], labels: Sequence[str]
    ) -> str:
        """The lines of one section.

        ``inputs``: an entry or a text for each placeholder; ``labels``: the word before each returned value.
        """
        names = frozenset(node.name for node in graph.nodes)
        given = iter([*inputs, *[None] * len(names)])
        rows: list[tuple[str, str, str, str]] = []
        last = "return"
        for node in graph.nodes:
            if node.op == "output":
                last = _return_text(node, labels, names)
                continue
            entry = next(given) if node.op == "placeholder" else None
            kind = entry.kind if isinstance(entry, Input) else None
            text = input_text(entry, node) if node.op == "placeholder" else self.expression(node, names)
            rows.append((node.name, text, self.types(node, kind), origin_text(node) if self.origins else ""))
        return "\n".join([heading, *aligned(rows), f"  {last}"])

    def expression(self, node: Node, names: frozenset[str]) -> str:
        if node.op == "get_attr":
            return f"attr {node.target}"
        if node.target is operator.getitem and not node.kwargs and isinstance(node.args[0], Node):
            return f"{node.args[0].name}[{argument_text(node.args[1], names)}]"
        if node.target in comm.TARGETS:
            arguments = comm_arguments(node, self.mesh, names)
        else:
            arguments = [argument_text(value, names) for value in node.args]
            arguments += [f"{key}={argument_text(value, names)}" for key, value in node.kwargs.items()]
        return f"{operator_name(node.target)}({', '.join(arguments)})"

    def types(self, node: Node, kind: InputKind | None) -> str:
        parts = []
        for position, value in enumerate(values(node)):
            usual = self.gradients(kind, node, value, position) if self.gradients else value.requires_grad
            mark = "" if value.requires_grad == usual else " grad" if value.requires_grad else " nograd"
            parts.append(type_text(value) + mark)
        return parts[0] if len(parts) == 1 else f"({', '.join(parts)})" if parts else ""


def _return_text(node: Node, labels: Sequence[str], names: frozenset[str]) -> str:
    """``return loss=a, saved b``; a long one is spread over several lines, each but the last ending in a comma."""
    returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    padded = [*labels, *[""] * (len(returned) - len(labels))]
    lines = ["return"]
    for position, (label, value) in enumerate(zip(padded, returned), 1):
        item = f" {label}{argument_text(value, names)}" + ("," if position < len(returned) else "")
        if len(lines[-1]) + len(item) > LINE_WIDTH and lines[-1] != "return":
            lines.append("        ")
        lines[-1] += item
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """``name = expression : type  # origin``; the few longest lines may stick out of their columns."""
    widest = max((len(name) for name, *_ in rows if len(name) <= NAME_WIDTH), default=0)
    lines = [f"  {name:<{widest}} = {text}" for name, text, *_ in rows]
    typed = [len(line) for line, row in zip(lines, rows) if row[2]]
    column = max((length for length in typed if length <= LINE_WIDTH), default=0)
    return [
        (f"{line:<{column}} : {kind}" if kind else line) + (f"  # {where}" if where else "")
        for line, (_, _, kind, where) in zip(lines, rows)
    ]


def origin_text(node: Node) -> str:
    where = origin(node)
    text = f"{where.module or '-'}  {where.source}".rstrip() if where.module or where.source else ""
    return " ".join(text.splitlines()).encode("ascii", "backslashreplace").decode()


def type_text(value: Value) -> str:
    return f"{DTYPE_NAMES[value.dtype]}{value.layout}"


# ---------------------------------------------------------------- operators and arguments


def operator_name(target: Any) -> str:
    """``aten.linear``, ``aten.add.Tensor``, ``comm.all_reduce``, ``op.attention`` (a function of autopar.operators)."""
    if target in comm.TARGETS:
        return f"comm.{comm.TARGETS[target]}"
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload == "default" else f"{namespace}.{name}.{overload}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target._name}"
    name = getattr(target, "__name__", str(target))
    return f"op.{name}" if REGISTRY.get(name) is target else f"python.{name}"


def argument_text(value: Any, names: frozenset[str] = frozenset()) -> str:
    """``names``: the nodes of the graph; a dtype is written in full where a node has its short name."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        short = DTYPE_NAMES.get(value)
        return short if short and short not in names else str(value)
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, slice):
        return f"slice({', '.join(argument_text(part, names) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, list):
        return f"[{', '.join(argument_text(item, names) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(argument_text(item, names) for item in value)}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, (bool, int, float, torch.layout, torch.memory_format)):
        return repr(value)
    if is_expression(value):
        return str(value)
    return f"<{type(value).__name__}: {ascii(value)}>"  # cannot be read back; parse says so


def comm_arguments(node: Node, mesh: Mesh, names: frozenset[str]) -> list[str]:
    """Arguments of a collective, without those that the mesh and the type of the value imply."""
    given = comm.arguments_of(node)
    layouts = [value.layout for value in values(node)]
    implied = implied_arguments(comm.TARGETS[node.target], given, mesh, layouts)
    texts = []
    for name, value in given.items():
        if name == "x":
            texts.append(argument_text(value, names))
        elif name == "axis":
            texts.append(str(value))
        elif name == "op" and value != "sum":
            texts.append(f"op={value}")
        elif name in ("source", "target"):
            texts.append(f"{name}={value[0] if list(value[1:]) == [1, 1] else argument_text(list(value))}")
        elif name not in implied or implied[name] != value:
            texts.append(f"{name}={argument_text(list(value) if name == 'ratio' else value)}")
    return texts


def implied_arguments(name: str, given: Mapping[str, Any], mesh: Mesh, layouts: Sequence[Layout]) -> dict[str, Any]:
    """The arguments of collective ``name`` that its line leaves out: op, ways, outer, ratio, length.

    ``layouts`` are those of its result, empty if its line has no type; then there is no ``length``.
    """
    implied: dict[str, Any] = {"op": "sum", "ways": mesh.size(given["axis"]), "outer": 1, "ratio": [1]}
    if layouts and "dim" in given:
        local, dim = layouts[0].local_shape(mesh), given["dim"]
        if -len(local) <= dim < len(local):
            ways = given.get("ways", implied["ways"])
            implied["length"] = local[dim] if comm.row_of(name).grows else local[dim] * ways
    return implied
