"""What exports are compared with: the model, the program's source where there is no model, and programs in bfloat16."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.errors import ExportError
from autopar.exporters.export import export
from autopar.exporters.whole_tensors import WholeTensors
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.tables import InputKind
from tests.exporters import examples

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from autopar.exporters import expected as expected_outputs  # noqa: E402
from autopar.exporters.in_float32 import is_narrow, model_in_float32, program_in_float32  # noqa: E402
from tests.exporters.test_logical import Table  # noqa: E402


def saved(axes: dict[str, int], folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, nn.Module]:
    """The directory of a small program, and its model, whose weights are in a file beside it."""
    torch.manual_seed(0)
    model = Table().to(dtype)
    plan = Plan(check_numerics=False, microbatches=1) if "pp" in axes else Plan(check_numerics=False)
    program = compile_program(model, Mesh(**axes), plan, (), {"ids": torch.randint(32, (4, 8))})
    program.save(folder / "program")
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "program", model


def about(folder: Path, format: str = "onnx") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["formats"][format]
    return found


@pytest.mark.parametrize(
    "axes, given, dtype",
    [
        pytest.param({"dp": 2, "tp": 2}, True, torch.float32, marks=pytest.mark.slow),
        ({"pp": 2}, False, torch.float32),
        ({"tp": 2}, True, torch.bfloat16),
    ],
    ids=str,
)
def test_a_program_on_disk_is_compared_with_its_source(
    axes: dict[str, int], given: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """No model is needed; nor for the buffers that no file of weights has."""
    directory, _ = saved(axes, tmp_path, dtype)
    weights = tmp_path / "model.safetensors" if given else None
    export(autopar.Program.load(directory), tmp_path / "out", "onnx", verify=True, weights_from=weights)
    found = about(tmp_path / "out")
    assert found["verified"].keys() == {"loss", "hidden"} and found["verified_against"] == "source"
    assert found.get("verified_in") == ("float32" if dtype is torch.bfloat16 else None)


def test_what_the_source_does_not_compute_is_refused(tmp_path: Path) -> None:
    directory, _ = saved({"tp": 2}, tmp_path)
    program = autopar.Program.load(directory)
    assert program.source is not None
    other = parse(str(program.source).replace("aten.relu(", "aten.tanh("))
    program = replace(program, source=replace(program.source, graph=other.graph))
    with pytest.raises(ExportError, match="output '(loss|hidden)' differs by 0"):
        export(program, tmp_path / "out", "onnx", verify=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- buffers that the model makes


def test_buffers_that_are_in_no_file_are_the_programs(tmp_path: Path) -> None:
    """In every way to give weights: also beside references into the files."""
    directory, model = saved({"tp": 2}, tmp_path)
    program = replace(autopar.Program.load(directory), source=None)
    for weights in ("safetensors", "reference"):
        export(program, tmp_path / "out", "pt2,onnx", weights=weights, weights_from=tmp_path / "model.safetensors")
        state = torch.export.load(tmp_path / "out" / "pt2" / "rank1.pt2").state_dict
        assert torch.equal(state["shift"], model.shift) and state["up.weight"].is_meta == (weights == "reference")
        found = onnx.load(tmp_path / "out" / "onnx" / "rank1.onnx")
        values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in found.graph.initializer}
        assert (values["shift"] == model.shift.numpy()).all() and ("up.weight" in values) == (weights == "safetensors")
        assert about(tmp_path / "out")["parts"][1].get("weights", {}).keys() == (
            model.state_dict().keys() if weights == "reference" else set()
        )


def test_given_buffers_come_first() -> None:
    found = WholeTensors.of({"a": torch.zeros(2)}, made={"a": torch.ones(2), "b": torch.ones(2)})
    assert float(found.find(["a"], (2,)).sum()) == 0 and float(found.find(["b"], (2,)).sum()) == 2
    assert found.has(["c", "b"]) and not found.has(["c"])


# ---------------------------------------------------------------- bfloat16


class Rounded(nn.Module):
    """A table from constants, rounded to bfloat16 before any input is; and a cast of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(8.0).div(7).cos().to(torch.bfloat16)
        return (self.up(x).float() * 3.0).to(torch.bfloat16) * table


def test_promoted_graphs_round_nothing_but_constants() -> None:
    torch.manual_seed(0)
    model, x = Rounded().bfloat16(), torch.randn(4, 8).bfloat16()
    program = compile_program(model, Mesh(), Plan(check_numerics=False), (x,))
    assert is_narrow(program) and program.source is not None
    for part in (program.source, expected_outputs.described(program)):
        wide = program_in_float32(part)
        assert all(
            value(node).dtype is torch.float32 for node, _ in wide.placeholders(InputKind.PARAMETER, InputKind.INPUT)
        )
        tensors, inputs = WholeTensors.of(model), {"x": x}
        (found,) = expected_outputs._of_graph(part, tensors, inputs, {}, narrow=True).values()
        table = torch.arange(8.0).div(7).cos().bfloat16().float()
        exact = torch.nn.functional.linear(x.float(), model.up.weight.float(), model.up.bias.float()) * 3.0 * table
        torch.testing.assert_close(found, exact.detach(), rtol=1e-6, atol=1e-6)
        assert not torch.equal(found, model(x).float().detach())  # which rounds in between


def test_promoted_models_have_no_narrow_type() -> None:
    """Inputs, constants, casts, and graphs inside nodes."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    main (bfloat16[2] x, bool c) => (bfloat16[2] y) {
        half = Constant <value = bfloat16[1] {16128}> ()
        z = If (c) <
            then_branch = yes () => (bfloat16[2] a) { a = Mul (x, half) },
            else_branch = no () => (bfloat16[2] b) { w = Cast <to = 1> (x) b = Cast <to = 16> (w) }>
        y = Identity (z)
    }"""
    model = onnx.parser.parse_model(text)
    model_in_float32(model)
    assert "bfloat16" not in onnx.printer.to_text(model)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, axes", [("llama", {"dp": 2, "tp": 2}), ("gpt2", {"pp": 2, "tp": 2}), ("mixtral", {"ep": 2})]
)
def test_models_in_bfloat16(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    model, batch = examples.build(name, torch.bfloat16)
    plan = Plan(check_numerics=False, microbatches=1) if "pp" in axes else Plan(check_numerics=False)
    program = compile_program(model, Mesh(**axes), plan, (), batch)
    export(program, tmp_path / "out", "onnx", verify=True, weights_from=model)
    found = about(tmp_path / "out")
    assert found["verified_in"] == "float32" and max(found["verified"].values()) <= 1e-5
