"""``logical.onnx``: the unsplit model with ONNX's own annotations of what lies where (IR 11, multi-device).

It is the program's source: what was traced, before any pass. The configuration ``mesh`` has the ranks as its devices.
Each node says how those of its inputs and outputs are split whose place is known (:mod:`autopar.exporters.places`), dim
by dim: ``device`` are groups of ranks with equal parts, one for each part, in order; and on a pipeline, its stage. The
annotations have plain splits only; what they cannot say (a fused QKV weight's segments) is left out there. They
describe, nothing executes them yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autopar.errors import ExportError
from autopar.exporters.job import Job
from autopar.exporters.onnx_functions import Functions
from autopar.exporters.onnx_rank import with_data
from autopar.exporters.onnx_role import onnx_role
from autopar.exporters.places import Place, activation_places, weight_places
from autopar.exporters.rank_module import Part, tensor_name
from autopar.exporters.traced import traced
from autopar.exporters.wiring import input_name
from autopar.ir.layout import runs
from autopar.ir.node import Node, output_node
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind, Output, OutputKind, Role
from autopar.mesh import Mesh

LOGICAL = "logical.onnx"
CONFIGURATION, LEAST_IR = "mesh", 11
VALUE = "autopar_value_"  # begins the name of a value that is returned until its name in the file is known


def write_logical(job: Job) -> None:
    """The source; it has the data of what no state dict has, and its other tensors are those of the ranks.

    Raises ExportError where the program keeps no source, and where torch.onnx cannot write it.
    """
    source = job.program.source
    if source is None:
        raise ExportError(
            f"no {LOGICAL}: this program does not keep what it was made from\nWay out: compile it again, and save it."
        )
    places = weight_places(job.program)
    known = activation_places(job.program, source)
    values = [node for node in known if node.op == "call_function"]
    part, functions = Part(_returning(source, values), 0), Functions()
    try:
        model = onnx_role(traced(part, forms=functions.forms), functions, job.options.opset, job.options.ir)
    except ExportError as error:
        raise ExportError(f"no {LOGICAL}: {str(error).splitlines()[0]}") from error
    names = _named(model.graph, values)
    places |= {names[node]: known[node] for node in values if node in names}
    inputs = source.placeholders(InputKind.INPUT)
    places |= {input_name(entry): known[node] for node, entry in inputs if node in known}
    model.graph.name = "logical"
    annotate(model, job.program.mesh, places)
    with_data(model, _made_tensors(job.program, source), job.directory, f"{model.graph.name}.safetensors")
    onnx.save(model, job.directory / LOGICAL)
    try:
        onnx.checker.check_model(str(job.directory / LOGICAL))  # by its path: it finds the data beside it
    except onnx.checker.ValidationError as error:
        (job.directory / LOGICAL).unlink()
        raise ExportError(f"no {LOGICAL}: it is no valid ONNX: {str(error).strip()[:300]}") from error


def _made_tensors(program: AnyProgram, source: Program) -> dict[str, Tensor]:
    """Constants, and buffers that the model makes itself, by their names in the file; those that have data."""
    found = {tensor_name(entry): source.constants[entry.target] for _, entry in source.placeholders(InputKind.CONSTANT)}
    found |= program.made_buffers
    return {name: tensor for name, tensor in found.items() if not isinstance(tensor, FakeTensor)}


def _returning(source: Program, nodes: Iterable[Node]) -> Program:
    """``source`` as a program that can be exported, which returns ``nodes`` too."""
    found = source.clone()
    copies = {node.name: node for node in found.graph.nodes}
    more = tuple(copies[node.name] for node in nodes)
    output_node(found.graph).args = ((*found.returned, *more),)
    outputs = tuple(Output(OutputKind.USER, f"{VALUE}{number}") for number in range(len(more)))
    role = Role(forward=found.graph, backward=None, inference=found.graph)
    return replace(found, outputs=(*found.outputs, *outputs), role=role)


def _named(graph: onnx.GraphProto, nodes: Iterable[Node]) -> dict[Node, str]:
    """Return no more than the model does; the names of ``nodes`` in the file, which are their own where these are free.

    One that is a user's output, or an input, has that name.
    """
    numbers = {f"{VALUE}{number}": node for number, node in enumerate(nodes)}
    dropped = [value for value in graph.output if value.name in numbers]
    graph.value_info.extend(dropped)
    for value in dropped:
        graph.output.remove(value)
    same = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.output[0] in numbers
    }
    for node in [node for node in graph.node if node.output[0] in same]:
        graph.node.remove(node)
    taken = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    found, renamed = dict[Node, str](), dict[str, str]()
    for name, node in numbers.items():
        found[node] = renamed[name] = node.name if node.name not in taken else name
        taken.add(found[node])
    found |= {numbers[name]: renamed.get(other, other) for name, other in same.items()}
    _rename(graph, renamed)
    return found


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


# ---------------------------------------------------------------- annotations


def annotate(model: onnx.ModelProto, mesh: Mesh, places: Mapping[str, Place]) -> None:
    """Add the configuration, and to each node what is known of the tensors that it takes and gives, by name."""
    model.ir_version = max(model.ir_version, LEAST_IR)
    configuration = model.configuration.add()
    configuration.name, configuration.num_devices = CONFIGURATION, mesh.world_size
    configuration.device.extend(f"rank{rank}" for rank in range(mesh.world_size))
    specs = {name: spec for name, place in places.items() if (spec := sharding(name, place)) is not None}
    for node in model.graph.node:
        names = [name for name in dict.fromkeys((*node.input, *node.output)) if name in places]
        stages = {places[name].stage for name in names} - {None}
        found = [specs[name] for name in names if name in specs]
        if not found and not stages:
            continue
        entry = node.device_configurations.add()
        entry.configuration_id = CONFIGURATION
        entry.sharding_spec.extend(found)
        if len(stages) == 1 and (stage := stages.pop()) is not None:
            entry.pipeline_stage = stage


def sharding(name: str, place: Place) -> onnx.ShardingSpecProto | None:
    """The split of a tensor; None for one that is whole on all ranks, and for a split that is no plain one."""
    owned: dict[tuple[tuple[int, int], ...], list[int]] = {}
    layout, mesh = place.layout, place.mesh
    for rank in place.ranks():
        here = mesh.coordinates(rank)
        ranges = []
        for dim, size in enumerate(layout.shape):
            found = layout.indices(dim, here, mesh)
            parts = [(0, size)] if found is None else runs(found)
            if len(parts) != 1:
                return None
            ranges.append(parts[0])
        owned.setdefault(tuple(ranges), []).append(rank)
    if len(owned) == 1 and place.stage is None:
        return None
    spec = onnx.ShardingSpecProto(tensor_name=name)
    for number, (_, ranks) in enumerate(sorted(owned.items())):
        spec.device.append(-1 - number)  # a group of devices, which the map spells out
        group = spec.index_to_device_group_map.add()
        group.key = -1 - number
        group.value.extend(ranks)
    for dim, starts in enumerate(zip(*([first for first, _ in ranges] for ranges in owned))):
        shards = len(set(starts))
        if shards > 1:
            sharded = spec.sharded_dim.add()
            sharded.axis = dim
            simple = sharded.simple_sharding.add()
            simple.dim_value, simple.num_shards = layout.shape[dim], shards
    return spec
