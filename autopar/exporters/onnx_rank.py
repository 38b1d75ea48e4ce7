"""The ONNX file of one rank: the model of its role with the rank's own groups, messages and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import helper
from torch import Tensor

from autopar.checkpoint.safetensors_file import SafetensorsFile, create
from autopar.exporters.collective_schemas import DOMAIN, VERSION
from autopar.exporters.rank_module import Part
from autopar.exporters.traced import Traced
from autopar.exporters.wiring import input_name, message_of, output_name, rank_of_stage
from autopar.ir.program import AnyProgram
from autopar.ir.tables import OutputKind
from autopar.mesh import PIPELINE


def rank_model(model: onnx.ModelProto, part: Part, role: Traced) -> onnx.ModelProto:
    """``model``, of the role, with the groups of the part's rank, and messages in place of what stages exchange."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    stages, number = len(part.whole.parts), 0
    for node in found.graph.node:
        if node.domain == DOMAIN:
            name = attributes(node)["group_name"]
            group = part.whole.mesh.group(part.rank, name)
            set_attributes(node, group=list(group), collective_id=number * stages + (part.stage or 0))
            number += 1
    _receive(found.graph, part, role, number * stages)
    _send(found.graph, part, role)
    if all(entry.domain != DOMAIN for entry in found.opset_import):
        found.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    found.graph.name = part.name
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name; texts as str."""
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}


def set_attributes(node: onnx.NodeProto, **given: Any) -> None:
    kept = [item for item in node.attribute if item.name not in given]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in given.items())])


def _messages(program: AnyProgram) -> dict[tuple[int, int, str], int]:
    """(from stage, to stage, name) -> its number, of all values that stages send."""
    found: dict[tuple[int, int, str], int] = {}
    for stage, part in enumerate(program.parts):
        for entry in part.outputs:
            if entry.kind is OutputKind.SENT and (message := message_of(entry)) is not None:
                found[stage, message[0], message[1]] = len(found)
    return found


def _receive(graph: onnx.GraphProto, part: Part, role: Traced, first: int) -> None:
    numbers, nodes = _messages(part.whole), []
    for _, entry in role.inputs:
        message = message_of(entry)
        if message is None:
            continue
        name = input_name(entry)
        (value,) = [value for value in graph.input if value.name == name]
        kind = value.type.tensor_type
        sender = rank_of_stage(part, message[0])
        nodes.append(
            helper.make_node(
                "Recv", [], [name], name=f"node_{name}", domain=DOMAIN, group=[sender, part.rank], group_name=PIPELINE,
                collective_id=numbers[message[0], part.stage or 0, message[1]],
                dtype=kind.elem_type, shape=[dim.dim_value for dim in kind.shape.dim],
            )
        )  # fmt: skip
        graph.input.remove(value)
        graph.value_info.append(value)
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])


def _send(graph: onnx.GraphProto, part: Part, role: Traced) -> None:
    numbers = _messages(part.whole)
    for entry in role.outputs:
        message = message_of(entry)
        if message is None:
            continue
        name = output_name(entry)
        (value,) = [value for value in graph.output if value.name == name]
        graph.node.append(
            helper.make_node(
                "Send", [name], [], name=f"node_{name}", domain=DOMAIN, group_name=PIPELINE,
                group=[part.rank, rank_of_stage(part, message[0])],
                collective_id=numbers[part.stage or 0, message[0], message[1]],
            )
        )  # fmt: skip
        graph.output.remove(value)
        graph.value_info.append(value)


# ---------------------------------------------------------------- tensors


def with_data(model: onnx.ModelProto, tensors: Mapping[str, Tensor], directory: Path, file: str) -> None:
    """Write ``tensors`` to a safetensors file, which the model's initializers of these names then refer to."""
    names = {value.name for value in model.graph.input}
    written = {name: tensor.contiguous() for name, tensor in tensors.items() if name in names}
    if not written:
        return
    create(directory / file, {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()})
    opened = SafetensorsFile(directory / file, writable=True)
    for name, tensor in written.items():
        opened.write(name, [0] * tensor.dim(), tensor.detach())
    opened.close()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in written.items()}
    for value in [value for value in model.graph.input if value.name in written]:
        model.graph.input.remove(value)
        tensor = onnx.TensorProto(name=value.name, data_type=value.type.tensor_type.elem_type)
        tensor.dims.extend(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        places = {"location": file, "offset": opened.entries[value.name].start, "length": sizes[value.name]}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(at)) for key, at in places.items())
        model.graph.initializer.append(tensor)


def note(model: onnx.ModelProto, **texts: Any) -> None:
    """Say more about the model in its metadata, as JSON under ``autopar.<name>``."""
    pairs: Iterable[tuple[str, Any]] = texts.items()
    for key, value in pairs:
        entry = model.metadata_props.add()
        entry.key, entry.value = f"autopar.{key}", json.dumps(value)
