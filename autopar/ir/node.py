"""Nodes of a graph and their types and origins; the only door to ``node.meta``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from autopar.ir.layout import Layout


def last_uses(graph: fx.Graph) -> dict[Node, list[Node]]:
    """Node -> the values that no later node needs (the node itself, if nothing uses it)."""
    seen = set(output_node(graph).all_input_nodes)
    dying: dict[Node, list[Node]] = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            continue
        for value in (*node.all_input_nodes, node):
            if value not in seen:
                seen.add(value)
                dying.setdefault(node, []).append(value)
    return dying


def repeated(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Of nodes that occur several times, all but the first occurrence: results that are returned once more."""
    seen, found = set[fx.Node](), []
    for node in nodes:
        found += [node] * (node in seen)
        seen.add(node)
    return found


Node = fx.Node


@dataclass(frozen=True)
class Value:
    """The type of one tensor in the graph: global shape and layout, dtype, and whether gradients flow through it."""

    dtype: torch.dtype
    layout: Layout
    requires_grad: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape


@dataclass(frozen=True)
class Origin:
    """Where a node comes from in the user's model."""

    module: str = ""  # dotted path, e.g. model.layers.0.mlp
    source: str = ""  # "file.py:12 in forward: x = self.up(x)"


_VALUES, _ORIGIN = "autopar_values", "autopar_origin"
_NOWHERE = Origin()


def output_node(graph: fx.Graph) -> Node:
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def values(node: Node) -> tuple[Value, ...]:
    """The types of the tensors that ``node`` returns (several for split, topk, ...; () before they are known)."""
    found: tuple[Value, ...] = node.meta.get(_VALUES, ())
    return found


def value(node: Node) -> Value:
    """The type of the one tensor that ``node`` returns."""
    (only,) = values(node)
    return only


def set_values(node: Node, *types: Value) -> None:
    node.meta[_VALUES] = types


def origin(node: Node) -> Origin:
    found: Origin = node.meta.get(_ORIGIN, _NOWHERE)
    return found


def set_origin(node: Node, where: Origin) -> None:
    node.meta[_ORIGIN] = where


def copy_meta(copy: Node, node: Node) -> None:
    """Give ``copy`` all that is known of ``node``."""
    copy.meta.update(node.meta)


def clear_meta(node: Node) -> None:
    """Drop everything torch left in ``node.meta``; ours is set by :func:`set_values` and :func:`set_origin`."""
    node.meta = {key: item for key, item in node.meta.items() if key in (_VALUES, _ORIGIN)}


def traced_value(node: Node) -> Any:
    """The (fake) value that torch's tracer recorded for ``node``: a tensor, a tuple of tensors, or None."""
    return node.meta.get("val")


def set_traced_value(node: Node, value: Any) -> None:
    """In place of what torch's tracer would record, see :func:`traced_value`."""
    node.meta["val"] = value


def traced_modules(node: Node) -> dict[str, tuple[str, Any]]:
    """The modules around ``node``, outermost first, as torch's tracer recorded them: key -> (path, class)."""
    return node.meta.get("nn_module_stack") or {}


def copy_traced(copy: Node, node: Node, modules: dict[str, tuple[str, Any]]) -> None:
    """Give ``copy`` all that torch's tracer recorded for ``node``, but ``modules`` around it."""
    copy.meta = {**node.meta, "nn_module_stack": modules}


def traced_origin(node: Node) -> Origin:
    """The module path and source line that torch's tracer recorded for ``node``."""
    stack = traced_modules(node)
    module = [path for path, _ in stack.values()][-1] if stack else ""
    return Origin(module, _last_line(node.meta.get("stack_trace") or ""))


@lru_cache(maxsize=256)  # copies of a block have the stack traces of the block
def _last_line(stack_trace: str) -> str:
    lines = [line.strip() for line in stack_trace.strip().splitlines()]
    frames = [
        (frame, code)
        for frame, code in zip(lines, lines[1:])
        if frame.startswith('File "') and "<eval_with_key>" not in frame  # code that torch.fx has written
    ]
    if not frames:
        return ""
    (_, file, rest), code = frames[-1][0].split('"', 2), frames[-1][1]
    where = rest.strip(", ").replace("line ", "", 1).replace(", in ", " in ", 1)
    return f"{file.rsplit('/', 1)[-1]}:{where}: {code}"
