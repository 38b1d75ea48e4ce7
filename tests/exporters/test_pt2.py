"""Exported ranks are run by torch alone, on real processes, and give what the unmodified model gives, in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.check import relative_error
from autopar.compiler import compile_program
from autopar.errors import ExportError
from autopar.exporters.export import export
from autopar.frontend.numerics import gradient_error, promote_float32
from autopar.ir.layout import unshard
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program, weight_layouts
from autopar.ir.stacked_parameters import by_member
from tests.exporters import examples
from tests.exporters.ranks import run_rank
from tests.launch import run_ranks

TOLERANCE = 1e-10


def exported(
    name: str, mesh: Mesh, folder: Path, plan: Plan, training: bool = False
) -> tuple[AnyProgram, dict[str, Tensor]]:
    """An example's program, its export in ``folder`` with inputs.pt, and the outputs of the unmodified model."""
    model, batch = examples.build(name)
    with promote_float32():
        program = compile_program(model, mesh, plan, (), batch)
        export(program, folder, "pt2", weights_from=model, training=training)
        result = model(**batch)
    expected = {name: tensor.detach() for name, tensor in result.items()}
    if training:
        result["loss"].backward()
        expected |= {f"grad {name}": x.grad for name, x in model.named_parameters() if x.grad is not None}
    torch.save(batch, folder / "inputs.pt")
    return program, expected


def largest_error(program: AnyProgram, found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> float:
    errors = []
    for entry, node in zip(program.outputs, program.returned):
        ranks = [rank for rank, outputs in enumerate(found) if entry.target in outputs]
        mesh = program.mesh.of_stage
        assert len(ranks) == mesh.world_size, entry.target
        whole = unshard([found[rank][entry.target] for rank in ranks], value(node).layout, mesh)
        errors.append(relative_error(whole, expected[entry.target]))
    return max(errors)


def largest_gradient_error(
    program: Program, found: list[dict[str, Tensor]], expected: dict[str, Tensor]
) -> dict[str, float]:
    layouts = weight_layouts(program)
    grads = {
        name: unshard([outputs[f"grad {name}"] for outputs in found], layouts[name], program.mesh)
        for name in program.required_role.grads
    }
    return gradient_error(by_member(grads), {name: expected.get(f"grad {name}") for name in by_member(grads)})


def check(name: str, mesh: Mesh, folder: Path, plan: Plan | None = None) -> None:
    plan = plan or Plan(check_numerics=False)
    program, expected = exported(name, mesh, folder, plan)
    found = run_ranks(run_rank, mesh.world_size, str(folder))
    assert largest_error(program, found, expected) < TOLERANCE


def test_ranks_give_what_the_model_gives(tmp_path: Path) -> None:
    check("llama", Mesh(tp=2), tmp_path / "out")


def check_step(name: str, axes: dict[str, int], plan: Plan, folder: Path) -> None:
    """Loss and every gradient of a rank, from a file that plain torch runs."""
    program, expected = exported(name, Mesh(**axes), folder, plan, training=True)
    found = run_ranks(run_rank, program.mesh.world_size, str(folder))
    assert isinstance(program, Program)
    assert largest_error(program, found, expected) < TOLERANCE
    errors = largest_gradient_error(program, found, expected)
    trained = [name for name in expected if name.startswith("grad ")]
    assert len(errors) == len(trained) and max(errors.values()) < TOLERANCE, errors


def test_a_training_step(tmp_path: Path) -> None:
    check_step("llama", {"dp": 2}, Plan(check_numerics=False, zero=2), tmp_path / "out")


def check_pipeline_step(name: str, axes: dict[str, int], plan: Plan, folder: Path) -> None:
    """Forward and backward files of the stages, called in another order than the schedule's: loss and all gradients."""
    program, expected = exported(name, Mesh(**axes), folder, plan, training=True)
    assert isinstance(program, PipelinedProgram)
    found = run_ranks(run_rank, program.mesh.world_size, str(folder))
    losses = [outputs["loss"] for outputs in found if "loss" in outputs]
    assert all(relative_error(loss, expected["loss"]) < TOLERANCE for loss in losses) and losses
    grads: dict[str, Tensor] = {}
    for number, stage in enumerate(program.stages):
        layouts = weight_layouts(stage)
        for parameter in (target for target in stage.required_role.grads if target in layouts):
            parts = [outputs[key] for outputs in found if (key := f"grad {number} {parameter}") in outputs]
            whole = unshard(parts, layouts[parameter], stage.mesh)
            grads[parameter] = grads[parameter] + whole if parameter in grads else whole
    errors = gradient_error(by_member(grads), {name: expected.get(f"grad {name}") for name in by_member(grads)})
    trained = [name for name in expected if name.startswith("grad ")]
    assert len(errors) == len(trained) and max(errors.values()) < TOLERANCE, errors


def test_a_training_step_of_a_pipeline(tmp_path: Path) -> None:
    """With tied weights, of which two stages have a gradient each."""
    check_pipeline_step("gpt2", {"pp": 2}, Plan(check_numerics=False, microbatches=2), tmp_path / "out")


PIPELINES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("llama", {"pp": 2, "tp": 2}, {"microbatches": 2}),
    ("llama", {"pp": 2, "dp": 2}, {"microbatches": 2, "zero": 3}),
    ("llama", {"pp": 2}, {"microbatches": 2, "schedule": "interleaved"}),
    ("bert", {"pp": 2, "sp": 2}, {"microbatches": 1}),
    ("t5", {"pp": 2}, {"microbatches": 2}),
    ("mixtral", {"pp": 2, "tp": 2}, {"microbatches": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes, choices", PIPELINES, ids=str)
def test_training_steps_of_pipelines(name: str, axes: dict[str, int], choices: dict[str, Any], tmp_path: Path) -> None:
    check_pipeline_step(name, axes, Plan(check_numerics=False, **choices), tmp_path / "out")


@pytest.mark.slow
def test_rows_of_unknown_number_are_refused(tmp_path: Path) -> None:
    """Between the two files of a stage; within the one file of a step they are no trouble."""
    model, batch = examples.build("mixtral")
    program = compile_program(model, Mesh(pp=2, ep=2), Plan(check_numerics=False, microbatches=1), (), batch)
    with pytest.raises(ExportError, match="Way out: Plan.capacity_factor"):
        export(program, tmp_path / "out", "pt2", training=True)
    assert list(tmp_path.iterdir()) == []


STEPS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("llama", {"sp": 2}, {}),
    ("llama", {"tp": 2}, {}),
    ("llama", {"dp": 2}, {"zero": 3}),
    ("gpt2", {"tp": 2}, {}),
    ("gpt2", {"sp": 2}, {}),
    ("bert", {"dp": 2, "tp": 2}, {}),
    ("bert", {"sp": 2}, {}),
    ("t5", {"tp": 2}, {}),
    ("t5", {"dp": 2}, {"zero": 3}),
    ("vit", {"tp": 2}, {}),
    ("mixtral", {"ep": 2}, {}),
    ("mixtral", {"dp": 2}, {"zero": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes, choices", STEPS, ids=str)
def test_training_steps(name: str, axes: dict[str, int], choices: dict[str, Any], tmp_path: Path) -> None:
    check_step(name, axes, Plan(check_numerics=False, **choices), tmp_path / "out")


SLOW = [(name, axes) for name in examples.NAMES for axes in examples.MESHES if examples.fits(name, axes)]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", SLOW, ids=str)
def test_the_matrix(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    microbatches = {"microbatches": 1} if "pp" in axes else {}
    check(name, Mesh(**axes), tmp_path / "out", Plan(check_numerics=False, **microbatches))


@pytest.mark.slow
def test_a_script_with_nothing_but_torch(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    exported("gpt2", Mesh(tp=2), folder, Plan(check_numerics=False))
    script = Path(__file__).with_name("ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(folder)]
    done = subprocess.run(torchrun, cwd=tmp_path, env={"PATH": "/usr/bin"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("'loss'") == 2


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program = compile_program(model, Mesh(tp=2), Plan(check_numerics=False), (torch.randn(2, 4),))
    state = model.state_dict()
    del state["2.weight"]
    with pytest.raises(ExportError, match="no tensor was given for '2.weight'"):
        export(program, tmp_path / "out", "pt2", weights_from=state)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_without_weights_a_file_has_names_and_shapes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program = compile_program(model, Mesh(tp=2), Plan(check_numerics=False), (torch.randn(2, 4),))
    export(program, tmp_path / "out", "pt2", rank=1)
    assert [path.name for path in (tmp_path / "out" / "pt2").iterdir()] == ["rank1.pt2"]
    state = torch.export.load(tmp_path / "out" / "pt2" / "rank1.pt2").state_dict
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_meta} == {
        "0.weight": (4, 4), "0.bias": (4,), "2.weight": (4, 4), "2.bias": (4,),
    }  # fmt: skip
