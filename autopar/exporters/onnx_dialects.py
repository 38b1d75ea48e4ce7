"""Collectives as TensorRT's ONNX parser takes them: ``DistCollective`` (TensorRT 10.16; all_to_all from 11).

Its attributes are those that NVIDIA's Polygraphy writes (``polygraphy multi-device shard``) and that TensorRT's page on
the operator explains: collective_operation, reduce_op, root, nb_rank (how many ranks take part), groups (which ones),
group_size. All of them run along dim 0.
"""

from __future__ import annotations

import onnx
import onnx.inliner

from autopar.errors import ExportError
from autopar.exporters.collective_schemas import DOMAIN
from autopar.exporters.onnx_functions import DOMAIN as FUNCTIONS
from autopar.exporters.onnx_rank import attributes, set_attributes

OPERATIONS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllToAll": "all_to_all",
    "Broadcast": "broadcast",
}


def to_tensorrt(model: onnx.ModelProto, file: str) -> onnx.ModelProto:
    """``model`` with collectives as DistCollective, messages of stages as inputs and outputs, functions written out.

    Raises ExportError for an exchange of unequal parts, and for one along another dim than the first.
    """
    model = onnx.inliner.inline_local_functions(model)
    kept = []
    for node in model.graph.node:
        if node.op_type in ("Send", "Recv") and node.domain == DOMAIN:
            ends = model.graph.output if node.op_type == "Send" else model.graph.input
            name = (*node.input, *node.output)[0]
            ends.append(next(value for value in model.graph.value_info if value.name == name))
            continue
        if node.domain == DOMAIN:
            _rewrite(node, file)
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    ends_ = {value.name for value in (*model.graph.input, *model.graph.output)}
    inner = [value for value in model.graph.value_info if value.name not in ends_]
    del model.graph.value_info[:]
    model.graph.value_info.extend(inner)
    opsets = [entry for entry in model.opset_import if entry.domain not in (DOMAIN, FUNCTIONS)]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model


def _rewrite(node: onnx.NodeProto, file: str) -> None:
    given = attributes(node)
    if len(node.input) > 1 or given.get("axis", 0) != 0:
        raise ExportError(
            f"{file}: {node.name} is an exchange of unequal parts, which DistCollective does not have\n"
            "Way out: Plan(capacity_factor=...) gives experts equal parts; or the dialect 'autopar'."
        )
    operation = OPERATIONS[node.op_type]
    group = list(given["group"])
    del node.attribute[:]
    set_attributes(
        node,
        collective_operation=operation,
        reduce_op=given.get("reduce_op", "none"),
        root=given.get("root", -1),
        nb_rank=len(group),
        groups=group,
        group_size=len(group),
    )
    node.op_type, node.domain = "DistCollective", ""
