"""ONNX files of all ranks: checked, merged to one standard model, and run against the unmodified one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.errors import ExportError
from autopar.exporters.export import export
from autopar.ir.program import AnyProgram
from tests.exporters import examples

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from autopar.exporters.collective_schemas import DOMAIN  # noqa: E402
from autopar.exporters.onnx_check import Call as Collective  # noqa: E402
from autopar.exporters.onnx_check import check_call, check_together  # noqa: E402
from autopar.exporters.verify import verify  # noqa: E402
from tests.exporters.small_network import ALLOWED, network, written  # noqa: E402

# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("axes", [{"dp": 2, "tp": 2}, {"tp": 1}], ids=["dp2tp2", "tp1"])
def test_a_small_network(axes: dict[str, int], tmp_path: Path) -> None:
    program, model = network(Mesh(**axes))
    errors = verify(*written(program, model, tmp_path)).errors
    assert errors.keys() == {"loss", "logits"} and max(errors.values()) <= ALLOWED


class Layers(nn.Module):
    """Layers whose operators are autopar's own, and a buffer that a call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.EmbeddingBag(16, 8, mode="mean"), nn.BatchNorm1d(8)
        self.cell, self.drop, self.out = nn.LSTM(8, 8, batch_first=True), nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.norm(self.table(ids))
        y: Tensor = self.out(self.drop(self.cell(rows.unsqueeze(1).expand(-1, 3, -1))[0]))
        return y


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_operators_of_autopar(training: bool, tmp_path: Path) -> None:
    """With dropout and statistics of the batch too, and the model is left as it was."""
    torch.manual_seed(0)
    model = Layers().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = compile_program(model, Mesh(dp=2), Plan(check_numerics=False), (torch.randint(16, (4, 3)),))
    assert verify(*written(program, model, tmp_path)).worst <= ALLOWED
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


MATRIX = [(name, axes) for name in examples.NAMES for axes in examples.MESHES if examples.fits(name, axes)]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", MATRIX, ids=str)
def test_the_matrix(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    check_model(name, axes, tmp_path)


@pytest.mark.slow
def test_experts_with_a_capacity(tmp_path: Path) -> None:
    """Which drop rows, as the model does not; their equal parts have a form in TensorRT."""
    model, batch = examples.build("mixtral", torch.float32)
    program = compile_program(model, Mesh(ep=2), Plan(check_numerics=False, capacity_factor=1.0), (), batch)
    sources = [model.state_dict(), dict(model.named_buffers())]
    export(program, tmp_path / "out", "onnx", verify=True, weights_from=sources, onnx_dialect="tensorrt")
    found = onnx.load(tmp_path / "out" / "onnx" / "rank0.onnx", load_external_data=False)
    assert {"DistCollective"} <= {node.op_type for node in found.graph.node}
    assert verify(*written(program, model, tmp_path / "files")).worst <= ALLOWED


def check_model(name: str, axes: dict[str, int], folder: Path) -> None:
    model, batch = examples.build(name, torch.float32)
    microbatches = {"microbatches": 1} if "pp" in axes else {}
    program = compile_program(model, Mesh(**axes), Plan(check_numerics=False, **microbatches), (), batch)
    errors = verify(*written(program, model, folder)).errors
    assert "loss" in errors and max(errors.values()) <= ALLOWED, errors


# ---------------------------------------------------------------- what must be caught


def collectives(folder: Path) -> Iterator[tuple[Path, str]]:
    """File and node of every collective."""
    for path in sorted(folder.glob("*.onnx")):
        for node in onnx.load(path, load_external_data=False).graph.node:
            if node.domain == DOMAIN:
                yield path, node.name


def remove(path: Path, name: str) -> None:
    """Let a collective of a file do nothing."""
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name == name]
    node.op_type, node.domain = "Identity", ""
    del node.attribute[:]
    del node.input[1:]
    if not node.output:  # a message
        model.graph.node.remove(node)
    elif not node.input:
        node.op_type = "Constant"
        node.attribute.append(onnx.helper.make_attribute("value_float", 0.0))
    onnx.save(model, path)


def check_removals(program: AnyProgram, model: nn.Module, folder: Path) -> None:
    job, found = written(program, model, folder)
    verify(job, found)
    kept = {path: path.read_bytes() for path in folder.glob("*.onnx")}
    names = list(collectives(folder))
    assert names
    for path, name in names:
        remove(path, name)
        with pytest.raises(ExportError):
            verify(job, found)
        path.write_bytes(kept[path])
    for name in dict.fromkeys(name for _, name in names):
        for path in [path for path, other in names if other == name]:
            remove(path, name)
        with pytest.raises(ExportError):
            verify(job, found)
        for path, content in kept.items():
            path.write_bytes(content)
    verify(job, found)


def test_every_collective_that_is_removed_is_caught(tmp_path: Path) -> None:
    """On one rank, and on all."""
    check_removals(*network(Mesh(dp=2, tp=2)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", [("llama", {"tp": 2}), ("mixtral", {"ep": 2}), ("gpt2", {"pp": 2, "tp": 2})])
def test_every_collective_of_a_model_that_is_removed_is_caught(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    model, batch = examples.build(name, torch.float32)
    microbatches = {"microbatches": 1} if "pp" in axes else {}
    program = compile_program(model, Mesh(**axes), Plan(check_numerics=False, **microbatches), (), batch)
    check_removals(program, model, tmp_path)


def call(rank: int, operator: str = "AllReduce", **given: object) -> Collective:
    usual = {"group": [0, 1], "group_name": "tp", "collective_id": 0, "reduce_op": "sum"}
    return Collective(f"rank{rank}.onnx", rank, "node", operator, usual | given)


def test_one_file_by_itself() -> None:
    check_call(call(0))
    for wrong in (
        call(0, "AllRedoce"),
        call(2),
        call(0, group=[0, 0]),
        call(0, reduce_op="mean"),
        call(1, "Send"),
        call(0, "Recv"),
    ):
        with pytest.raises(ExportError):
            check_call(wrong)


def test_files_together() -> None:
    both = [[call(0), call(0, collective_id=1)], [call(1), call(1, collective_id=1)]]
    check_together(both)
    check_together([[call(0, "Send")], [call(1, "Recv")]])
    swapped = [both[0], both[1][::-1]]
    for wrong, words in (
        ([both[0], both[1][:1]], "take part"),
        ([both[0], [call(1, reduce_op="max"), both[1][1]]], "reduce_op"),
        ([both[0], [call(1, "AllGather"), both[1][1]]], "other members"),
        ([[call(0), call(0)], both[1]], "twice"),
        (swapped, "another order"),
        ([[call(0, "Send")], []], "take part"),
    ):
        with pytest.raises(ExportError, match=words):
            check_together(wrong)
