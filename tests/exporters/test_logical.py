"""``logical.onnx``: the program's source as it was traced, and what its annotations say of the ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.exporters.export import export
from autopar.exporters.places import activation_places
from autopar.ir.layout import shard
from autopar.ir.node import Node, output_node, value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import rank_inputs
from tests.exporters import examples

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ALLOWED = 1e-5


class Table(nn.Module):
    """With a buffer that no state dict has, and a table that the model makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("shift", torch.arange(16.0), persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        scale = torch.tensor([0.5, 1.0, 1.5, 2.0])
        hidden = self.down(torch.relu(self.up(self.table(ids) + self.shift)))
        return {"loss": hidden.square().mean(), "hidden": hidden * scale.repeat(4)}


def exported(axes: dict[str, int], folder: Path) -> tuple[AnyProgram, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = Table(), {"ids": torch.randint(32, (4, 8))}
    plan = Plan(check_numerics=False, microbatches=1) if "pp" in axes else Plan(check_numerics=False)
    program = compile_program(model, Mesh(**axes), plan, (), batch)
    export(program, folder, "onnx", rank=0)
    return program, model, batch


def specs(found: Any) -> dict[str, Any]:
    return {
        spec.tensor_name: spec
        for node in found.graph.node
        for entry in node.device_configurations
        for spec in entry.sharding_spec
    }


def devices(spec: Any) -> list[list[int]]:
    return [list(group.value) for group in spec.index_to_device_group_map]


def test_a_mesh_without_stages(tmp_path: Path) -> None:
    """Written from the program alone, it computes what the model does, with the weights of the model alone."""
    _, model, batch = exported({"dp": 2, "tp": 2}, tmp_path / "out")
    path = tmp_path / "out" / "onnx" / "logical.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in {**model.state_dict(), **batch}.items()}
    assert {entry.name for entry in session.get_inputs()} == feeds.keys()
    found = dict(zip((entry.name for entry in session.get_outputs()), session.run(None, feeds)))
    assert found.keys() == {"loss", "hidden"}
    for name, tensor in model(**batch).items():
        assert np.abs(found[name] - tensor.detach().numpy()).max() <= ALLOWED * float(tensor.detach().abs().max())
    check_annotations(path)


def check_annotations(path: Path) -> None:
    """Of inputs and activations too."""
    found = specs(onnx.load(path, load_external_data=False))
    assert devices(found["ids"]) == devices(found["add"]) == [[0, 1], [2, 3]]
    relu = found["relu"]  # rows by dp, columns by tp
    assert [(dim.axis, dim.simple_sharding[0].num_shards) for dim in relu.sharded_dim] == [(0, 2), (2, 2)]
    assert devices(relu) == [[0], [1], [2], [3]]
    assert devices(found["linear_1"]) == [[0, 1], [2, 3]]  # the sum over tp, not a summand
    assert "shift" not in found and "loss" not in found  # whole on all ranks


def test_a_pipeline_has_stages(tmp_path: Path) -> None:
    program, _, _ = exported({"pp": 2, "tp": 2}, tmp_path / "out")
    found = onnx.load(tmp_path / "out" / "onnx" / "logical.onnx", load_external_data=False)
    stage_of = {
        name: entry.pipeline_stage
        for node in found.graph.node
        for entry in node.device_configurations
        for name in node.output
    }
    assert set(stage_of.values()) == {0, 1} and stage_of["hidden"] == 1
    known = specs(found)
    for number, stage in enumerate(program.parts):
        assert stage_of["relu"] == number or all(node.name != "relu" for node in stage.graph.nodes)
        ranks = [2 * number, 2 * number + 1]
        for entry in stage.inputs:
            if entry.kind is InputKind.PARAMETER:
                assert sorted(rank for group in devices(known[entry.target]) for rank in group) == ranks, entry


# ---------------------------------------------------------------- what is said is true


def returning(program: Program, names: list[str]) -> Program:
    found = replace(program, role=None).clone()
    nodes = {node.name: node for node in found.graph.nodes}
    output_node(found.graph).args = (tuple(nodes[name] for name in names),)
    return found


def check_places(program: AnyProgram, model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Each annotated value of the source, cut by its place, is what the ranks have. Gives how many there are."""
    assert isinstance(program, Program) and program.source is not None
    places = {
        node: place for node, place in activation_places(program, program.source).items() if node.op != "placeholder"
    }
    settled: dict[Node, str] = {}
    for node, place in places.items():
        (other,) = [other for other in program.graph.nodes if other.name == node.name]
        while value(other).layout.partial:
            (other,) = other.users
        assert value(other).layout == place.layout
        settled[node] = other.name
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    results = []
    for part, names in ((program.source, [node.name for node in places]), (program, list(settled.values()))):
        with torch.no_grad():
            results.append(Lockstep(part.mesh).run(returning(part, names).graph, rank_inputs(part, tensors, (), batch)))
    for (node, place), whole, ranks in zip(places.items(), *results):
        for rank, found in enumerate(ranks):
            wanted = shard(whole[0], place.layout, program.mesh, program.mesh.coordinates(rank))
            for dim, size in enumerate(wanted.shape):
                found = found.narrow(dim, 0, size)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, node=node: f"{node}: {m}")
    return len(places)


@pytest.mark.parametrize("axes", [{"dp": 2, "tp": 2}, {"tp": 3}, {"dp": 1}], ids=str)
def test_annotations_of_a_small_network_are_true(axes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, batch = Table().double(), {"ids": torch.randint(32, (4, 8))}
    program = compile_program(model, Mesh(**axes), Plan(check_numerics=False, on_indivisible="replicate"), (), batch)
    assert check_places(program, model, batch) >= 5


EXACT = [
    (name, axes)
    for name in examples.NAMES
    for axes in ({"dp": 2, "tp": 2}, {"sp": 2}, {"ep": 2})
    if examples.fits(name, axes)
]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", EXACT, ids=str)
def test_annotations_are_true(name: str, axes: dict[str, int]) -> None:
    model, batch = examples.build(name)
    program = compile_program(model, Mesh(**axes), Plan(check_numerics=False), (), batch)
    assert check_places(program, model, batch) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.NAMES)
@pytest.mark.parametrize("axes", [{"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_models_have_one(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    """Experts too, from the program alone."""
    model, batch = examples.build(name, torch.float32)
    plan = Plan(check_numerics=False, microbatches=2) if "pp" in axes else Plan(check_numerics=False)
    export(compile_program(model, Mesh(**axes), plan, (), batch), tmp_path / "out", "onnx", rank=0)
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())["formats"]["onnx"]
    assert about.get("logical") == "logical.onnx", about["no_logical"]
    found = onnx.load(tmp_path / "out" / "onnx" / "logical.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "out" / "onnx" / "logical.onnx"), full_check=True)
    assert len(specs(found)) > len(list(model.parameters())) // 2
