"""``logical.onnx``: the unsplit model with ONNX's own annotations of what lies where (IR 11, multi-device).

The configuration ``mesh`` has the ranks as its devices. Each node that takes a parameter says how that is split, dim by
dim: ``device`` are groups of ranks with equal parts, one for each part, in order. The annotations have plain splits
only; what they cannot say (a fused QKV weight's segments) is left out there. They describe, nothing executes them yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common
from torch import nn

from autopar.errors import ExportError
from autopar.exporters.job import Job
from autopar.exporters.onnx_role import OPSET, without_notes
from autopar.exporters.verify import call_of, random_tensors
from autopar.exporters.wiring import output_name
from autopar.ir.layout import Layout, runs
from autopar.ir.program import Program, weight_layouts
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import Mesh

LOGICAL = "logical.onnx"
CONFIGURATION, LEAST_IR = "mesh", 11


def write_logical(job: Job, model: nn.Module) -> None:
    """The unmodified model, without data: its tensors are those of the ranks.

    Raises ExportError where torch.onnx cannot write it.
    """
    assert isinstance(job.program, Program)
    inputs = random_tensors(job.program, (InputKind.INPUT,))
    args, kwargs = call_of(job.program, inputs)
    opset = job.options.opset or OPSET
    try:
        with torch.no_grad(), without_notes():
            made = torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, optimize=False, opset_version=opset, verbose=False
            )
    except Exception as error:  # of many classes
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"no {LOGICAL}: torch.onnx cannot write the unsplit model: {reason[:300]}") from error
    assert made is not None
    users = [entry for entry in job.program.outputs if entry.kind is OutputKind.USER]
    for value, entry in zip(made.model.graph.outputs, users):
        value.name = output_name(entry)
    layouts = weight_layouts(job.program)
    for name in [name for name in made.model.graph.initializers if name in layouts]:
        value = made.model.graph.initializers.pop(name)
        value.const_value = None
        made.model.graph.inputs.append(value)
    found: onnx.ModelProto = onnx_ir.to_proto(common.NameFixPass()(made.model).model)
    annotate(found, job.program.mesh, layouts)
    onnx.checker.check_model(found)
    onnx.save(found, job.directory / LOGICAL)


def annotate(model: onnx.ModelProto, mesh: Mesh, layouts: Mapping[str, Layout]) -> None:
    """Add the configuration, and to each node what is known of the parameters that it takes."""
    model.ir_version = max(model.ir_version, LEAST_IR)
    configuration = model.configuration.add()
    configuration.name, configuration.num_devices = CONFIGURATION, mesh.world_size
    configuration.device.extend(f"rank{rank}" for rank in range(mesh.world_size))
    for node in model.graph.node:
        specs = [spec for name in node.input if name in layouts and (spec := sharding(name, layouts[name], mesh))]
        if specs:
            entry = node.device_configurations.add()
            entry.configuration_id = CONFIGURATION
            entry.sharding_spec.extend(specs)


def sharding(name: str, layout: Layout, mesh: Mesh) -> onnx.ShardingSpecProto | None:
    """The split of a tensor; None for one that is whole on all ranks, and for a split that is no plain one."""
    owned: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank in range(mesh.world_size):
        here = mesh.coordinates(rank)
        ranges = []
        for dim, size in enumerate(layout.shape):
            found = layout.indices(dim, here, mesh)
            parts = [(0, size)] if found is None else runs(found)
            if len(parts) != 1:
                return None
            ranges.append(parts[0])
        owned.setdefault(tuple(ranges), []).append(rank)
    if len(owned) == 1:
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
