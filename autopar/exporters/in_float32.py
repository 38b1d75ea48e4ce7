"""Programs and ONNX models in bfloat16, as the same in float32: what ONNX Runtime's kernels on a CPU can compute.

Both lose their roundings to bfloat16, and so can be compared. What depends on constants alone keeps its own: passes
have evaluated that before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import fx

from autopar.ir.node import Node, Value, set_values, value, values
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind

NARROW, WIDE = torch.bfloat16, torch.float32
OF_TYPE = ("to", "dtype")  # the attributes of ONNX operators that name a type
NARROW_ONNX, WIDE_ONNX = TensorProto.BFLOAT16, TensorProto.FLOAT


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of ``dtype`` is compared."""
    return WIDE if dtype is NARROW else dtype


def is_narrow(program: AnyProgram) -> bool:
    """Whether a rank computes in bfloat16 anywhere."""
    graphs = (graph for part in program.parts for graph in part.graphs.values())
    return any(kind.dtype is NARROW for graph in graphs for node in graph.nodes for kind in values(node))


# ---------------------------------------------------------------- graphs


def program_in_float32(program: Program) -> Program:
    """A copy of ``program`` (its graph, not its role) that computes in float32 what it computes in bfloat16."""
    found = replace(program, role=None).clone()
    fixed = _fixed(found)
    for node in list(found.graph.nodes):
        if node.op == "placeholder" and node not in fixed:
            _widen(node)
        elif node.op == "call_function" and node not in fixed:
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), partial(_wide, user=node, fixed=fixed))
            node.args, node.kwargs = _with_wide_dtypes((node.args, node.kwargs))
            _widen(node)
    return found


def _fixed(program: Program) -> set[Node]:
    """The nodes that depend on constants alone."""
    found = {node for node, _ in program.placeholders(InputKind.CONSTANT)}
    for node in program.graph.nodes:
        if node.op == "call_function" and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _wide(given: Node, user: Node, fixed: set[Node]) -> Node:
    if given not in fixed or all(kind.dtype is not NARROW for kind in values(given)):
        return given
    with user.graph.inserting_before(user):
        cast = user.graph.call_function(torch.ops.aten.to.dtype, (given, WIDE))
    set_values(cast, _wide_kind(value(given)))
    return cast


def _with_wide_dtypes(arguments: Any) -> Any:
    return fx.node.map_aggregate(arguments, lambda x: WIDE if x is NARROW else x)


def _widen(node: Node) -> None:
    set_values(node, *map(_wide_kind, values(node)))


def _wide_kind(kind: Value) -> Value:
    return replace(kind, dtype=widened(kind.dtype))


# ---------------------------------------------------------------- ONNX


def model_in_float32(model: onnx.ModelProto) -> None:
    """Let ``model``, whose weights are inputs, compute in float32 what it computes in bfloat16."""
    _graph_in_float32(model.graph)
    for function in model.functions:
        _nodes_in_float32(function.node)
        _types_in_float32(function.value_info)


def _graph_in_float32(graph: onnx.GraphProto) -> None:
    _types_in_float32(itertools.chain(graph.input, graph.output, graph.value_info))
    for tensor in graph.initializer:
        _tensor_in_float32(tensor)
    _nodes_in_float32(graph.node)


def _types_in_float32(entries: Iterable[onnx.ValueInfoProto]) -> None:
    for entry in entries:
        if entry.type.tensor_type.elem_type == NARROW_ONNX:
            entry.type.tensor_type.elem_type = WIDE_ONNX


def _nodes_in_float32(nodes: Iterable[onnx.NodeProto]) -> None:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.name in OF_TYPE and attribute.i == NARROW_ONNX:
            attribute.i = WIDE_ONNX
        if attribute.HasField("t"):
            _tensor_in_float32(attribute.t)
        if attribute.HasField("g"):
            _graph_in_float32(attribute.g)


def _tensor_in_float32(tensor: TensorProto) -> None:
    if tensor.data_type == NARROW_ONNX:
        wide = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
