"""All ranks as one standard ONNX model: collectives become Add, Concat, Split over the values of the ranks.

Names have the file before them (``rank0/...``). State that is in safetensors files stands among the inputs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir
from onnx import helper
from onnx_ir.passes.common import TopologicalSortPass

from autopar.errors import ExportError
from autopar.exporters.collective_schemas import COUNTED, DOMAIN
from autopar.exporters.onnx_check import Call
from autopar.exporters.onnx_rank import attributes

REDUCE = {"sum": "Add", "max": "Max", "min": "Min"}


def merged(models: Mapping[str, tuple[int, onnx.ModelProto]]) -> onnx.ModelProto:
    """One model of those of all ranks: file stem -> (rank, model). Raises ExportError where they wait in a ring."""
    world = onnx.GraphProto(name="world")
    calls: dict[Any, dict[int, tuple[onnx.NodeProto, Call]]] = defaultdict(dict)
    for stem, (rank, model) in models.items():
        _prefix(model.graph, f"{stem}/")
        world.input.extend(model.graph.input)
        world.output.extend(model.graph.output)
        world.initializer.extend(_inside(model.graph, world))
        for node in model.graph.node:
            if node.domain == DOMAIN:
                call = Call(stem, rank, node.name, node.op_type, attributes(node))
                calls[call.key][rank] = node, call
            else:
                world.node.append(node)
    for key, members in calls.items():
        world.node.extend(_plain(f"world/{key[0]}_{'_'.join(map(str, key[1]))}_{key[2]}", members))
    first = next(model for _, model in models.values())
    opsets = {entry.domain: entry for _, model in models.values() for entry in model.opset_import}
    opsets.pop(DOMAIN, None)
    functions = {(entry.domain, entry.name): entry for _, model in models.values() for entry in model.functions}
    found = helper.make_model(
        world, opset_imports=list(opsets.values()), ir_version=first.ir_version, functions=list(functions.values())
    )
    try:
        sorted_: onnx.ModelProto = onnx_ir.to_proto(TopologicalSortPass()(onnx_ir.from_proto(found)).model)
    except (ValueError, onnx_ir.passes.PassError) as error:
        raise ExportError(f"the ranks wait for each other: {str(error)[:300]}") from error
    return sorted_


def _prefix(graph: onnx.GraphProto, prefix: str) -> None:
    """Put ``prefix`` before every name of the graph, and of the graphs in its nodes."""
    for item in itertools.chain(graph.input, graph.output, graph.initializer, graph.value_info):
        item.name = prefix + item.name
    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = [prefix + name if name else "" for name in node.input]
        node.output[:] = [prefix + name if name else "" for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _prefix(attribute.g, prefix)


def _inside(graph: onnx.GraphProto, world: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers with their data in the model; the others become inputs of ``world``."""
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            world.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            yield tensor


def _plain(name: str, members: Mapping[int, tuple[onnx.NodeProto, Call]]) -> Iterator[onnx.NodeProto]:
    """The standard nodes for one collective of its members."""
    call = next(call for _, call in members.values())
    nodes = [members[rank][0] for rank in call.given["group"]]
    results = [node.output[0] for node in nodes if node.output]
    kind, sources = nodes[0].op_type, [node.input[0] for node in nodes if node.input]
    if kind in ("AllReduce", "ReduceScatter"):
        whole = yield from _reduced(name, sources, REDUCE[call.given["reduce_op"]])
        if kind == "AllReduce":
            yield from (helper.make_node("Identity", [whole], [result]) for result in results)
        else:
            yield helper.make_node("Split", [whole], results, axis=call.given["axis"], num_outputs=len(results))
    elif kind == "AllGather":
        yield helper.make_node("Concat", sources, [name], axis=call.given["axis"])
        yield from (helper.make_node("Identity", [name], [result]) for result in results)
    elif kind == "AllToAll":
        yield from _exchanged(name, nodes)
    else:  # a message, or a broadcast
        source = sources[call.given.get("root", 0)]
        yield from (helper.make_node("Identity", [source], [result]) for result in results)


def _reduced(name: str, sources: Sequence[str], operator: str) -> Any:
    total = sources[0]
    for place, source in enumerate(sources[1:]):
        yield helper.make_node(operator, [total, source], [f"{name}/{place}"])
        total = f"{name}/{place}"
    return total


def _exchanged(name: str, nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Each member's rows cut into those for each other, and those from all others joined."""
    pieces = [[f"{name}/{sender}_{taker}" for taker in range(len(nodes))] for sender in range(len(nodes))]
    for node, own in zip(nodes, pieces):
        counts = [node.input[COUNTED["send"]]] if len(node.input) > 1 else []
        split = helper.make_node("Split", [node.input[0], *counts], own, axis=0)
        if not counts:
            split.attribute.append(helper.make_attribute("num_outputs", len(nodes)))
        yield split
    for taker, node in enumerate(nodes):
        yield helper.make_node("Concat", [own[taker] for own in pieces], [node.output[0]], axis=0)
