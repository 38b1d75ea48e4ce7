"""``parallelize(..., program=)``: the numbers of the unmodified model, nothing traced, and another model is refused."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar
import autopar.compiler
from autopar import Mesh, Plan, ProgramFileError
from autopar.ir.fingerprint import Fingerprint
from autopar.ir.program import PipelinedProgram
from autopar.models import gpt
from tests.against_one_process import difference
from tests.launch import run_ranks
from tests.selection import slow_but


class Small(nn.Module):
    """Dropout, a tied weight, a buffer, a number and a text that become constants of the graph."""

    def __init__(self, heads: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.eps, self.kind = heads, eps, "tanh"
        self.tokens = nn.Embedding(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids) * self.scale
        x = x.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2) + self.eps
        logits = self.head(x + self.down(self.drop(self.up(x)).tanh()))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def small(**settings: Any) -> Small:
    torch.manual_seed(0)
    return Small(**settings).double()


def batch_of(rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(12, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids.roll(-1, 1).index_fill(1, torch.tensor([0]), -100)}


def written(directory: Path, model: nn.Module, mesh: Mesh, plan: Plan | None = None, **batch: Any) -> Path:
    autopar.compile_program(model, mesh, plan, (), batch or batch_of()).save(directory)
    return directory


def traced(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("this call was traced")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return written(tmp_path / "program", small(), Mesh(dp=2, tp=2), Plan(zero=1))


# ---------------------------------------------------------------- the same numbers, without tracing


def gpt_batch(rows: int) -> dict[str, Tensor]:
    return gpt.example_batch(gpt.PRESETS["tiny"], rows, 8)


@pytest.mark.parametrize(
    ("mesh", "plan", "rows"),
    slow_but(
        [0],
        [
            (Mesh(dp=1), Plan(), 4),
            (Mesh(dp=2, tp=2), Plan(zero=3), 4),
            (Mesh(pp=2, tp=2), Plan(microbatches=2, schedule="gpipe"), 3),  # the last microbatch has one row: the tail
        ],
    ),
    ids=["one", "zero", "pipeline"],
)
def test_the_numbers_of_the_model(
    mesh: Mesh, plan: Plan, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = gpt.build(layers=2).double(), gpt_batch(rows)
    directory = written(tmp_path / "program", copy.deepcopy(model), mesh, plan, **batch)
    monkeypatch.setattr(autopar.compiler, "trace", traced)
    parallel = autopar.parallelize(copy.deepcopy(model), program=directory)
    assert (parallel.mesh, parallel.plan) == (mesh, plan)
    assert isinstance(parallel.program, PipelinedProgram) == mesh.is_pipelined
    step, output = parallel.simulate(**batch), model(**batch)
    output["loss"].backward()
    assert step.loss is not None
    assert difference(step.loss, output["loss"]) < 1e-12
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(step.grads[name], parameter.grad, rtol=0, atol=1e-12)


def steps_of_a_rank(directory: str, rows: tuple[int, ...]) -> dict[str, float]:
    """Steps from a stored program, on batches that it was compiled for."""
    autopar.compiler.trace = traced
    torch.manual_seed(0)
    model = gpt.build(layers=2).double()
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, program=directory)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (parallel, reference)]
    errors = {}
    for step, count in enumerate(rows):
        batch = gpt_batch(count)
        loss = parallel.train_step(**batch)
        expected = reference(**batch)["loss"]
        expected.backward()
        errors[f"loss {step}"] = difference(loss, expected)
        found = parallel.full_grads()
        errors |= {f"{name} {step}": difference(found[name], p.grad) for name, p in reference.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return errors


@pytest.mark.parametrize(
    ("mesh", "plan", "rows"),
    [(Mesh(dp=2, tp=2), Plan(zero=3), 4), (Mesh(pp=2, dp=2), Plan(microbatches=2), 6)],
    ids=["zero", "pipeline"],
)
def test_four_ranks_start_from_one_program(mesh: Mesh, plan: Plan, rows: int, tmp_path: Path) -> None:
    """On the pipeline the second microbatch is smaller: its program is in the directory too."""
    torch.manual_seed(0)
    directory = written(tmp_path / "program", gpt.build(layers=2).double(), mesh, plan, **gpt_batch(rows))
    for errors in run_ranks(steps_of_a_rank, 4, str(directory), (rows, rows)):
        assert len(errors) > 2 and max(errors.values()) < 1e-12, errors


# ---------------------------------------------------------------- other calls


def test_another_call_is_compiled_and_told_once(program: Path, caplog: pytest.LogCaptureFixture) -> None:
    parallel, model = autopar.parallelize(small(), program=program), small()
    with caplog.at_level(logging.WARNING, "autopar"):
        parallel.simulate(**batch_of())
        assert not caplog.records
        for _ in range(2):
            step = parallel.simulate(**batch_of(rows=2))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"making another program: the program in {program} was compiled for another kind of call")
    assert "compiled  training, ids i64[4, 6], labels i64[4, 6]" in said
    assert "now       training, ids i64[2, 6], labels i64[2, 6]" in said
    assert step.loss is not None and difference(step.loss, model(**batch_of(rows=2))["loss"]) < 1e-12


def test_a_parameter_that_is_frozen_later(program: Path, caplog: pytest.LogCaptureFixture) -> None:
    parallel = autopar.parallelize(small(), program=program)
    parallel.up.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "autopar"):
        step = parallel.simulate(**batch_of())
    assert "others are trained" in caplog.text
    assert "up.weight" not in step.grads and "down.weight" in step.grads


def test_several_programs(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for training and one for evaluation, as a directory and as a program."""
    evaluated = small().eval()
    other = autopar.compile_program(evaluated, Mesh(dp=2, tp=2), Plan(zero=1), (), batch_of())
    monkeypatch.setattr(autopar.compiler, "trace", traced)
    parallel = autopar.parallelize(small(), program=[program, other])
    for module in (parallel.train(), parallel.eval()):
        step = module.simulate(**batch_of())
        assert step.loss is not None and difference(step.loss, small()(**batch_of())["loss"]) < 1e-12


# ---------------------------------------------------------------- refusals


def widened() -> nn.Module:
    model = small()
    model.up, model.down = nn.Linear(8, 24).double(), nn.Linear(24, 8).double()
    return model


def changed(change: Callable[[Small], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = small()
        change(model)
        return model

    return build


class Other(Small):
    pass


OTHER_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (
        widened,
        r"up.weight: parameter f64\[16, 8\] trained in the program, parameter f64\[24, 8\] trained here",
    ),
    "dtype": (lambda: small().float(), r"tokens.weight: parameter f64\[12, 8\] trained in the program, parameter f32"),
    "frozen": (
        changed(lambda model: model.up.requires_grad_(False)),
        r"up.weight: parameter f64\[16, 8\] trained in the program, .* frozen here",
    ),
    "untied": (
        changed(lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(12, 8).double()))),
        "head.weight: .* tied to tokens.weight in the program",
    ),
    "buffer": (changed(lambda model: model.register_buffer("more", torch.ones(1))), "more: missing in the program"),
    "module": (changed(lambda model: setattr(model, "drop", nn.Identity())), "module drop: .*Dropout.* in the program"),
    "class": (lambda: Other().double(), "module the model: .*Small.* in the program, .*Other.* here"),
    "number": (lambda: small(heads=4), "module the model: heads=2 in the program, heads=4 here"),
    "setting": (lambda: small(eps=0.0), "module the model: eps=1e-05 in the program, eps=0.0 here"),
    "part in evaluation": (
        changed(lambda model: model.drop.eval()),
        r"module drop: .* in the program, .* in evaluation here",
    ),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_model_is_refused(case: str, program: Path) -> None:
    build, message = OTHER_MODELS[case]
    with pytest.raises(ProgramFileError, match=f"(?s){message}.*Way out: compile it again") as caught:
        autopar.parallelize(build(), program=program)
    assert len(str(caught.value).splitlines()) < 15


def test_another_mesh_or_plan_is_refused(program: Path) -> None:
    with pytest.raises(ProgramFileError, match=r"mesh: mesh\(dp=2 tp=2\) in the program, mesh\(dp=4\) here"):
        autopar.parallelize(small(), Mesh(dp=4), program=program)
    with pytest.raises(ProgramFileError, match="plan: zero=1 in the program, 0 here"):
        autopar.parallelize(small(), Mesh(dp=2, tp=2), Plan(), program=program)
    parallel = autopar.parallelize(small(), Mesh(dp=2, tp=2), Plan(zero=1, seed=3, timeout=9.0), program=program)
    assert parallel.plan.seed == 3  # no program depends on it
    with pytest.raises(ValueError, match="parallelize needs a mesh"):
        autopar.parallelize(small())


@pytest.mark.parametrize("key", ["torch", "autopar", "source of tests.test_stored_programs"])
def test_other_code_is_refused(key: str) -> None:
    program = autopar.compile_program(small(), Mesh(dp=2), None, (), batch_of())
    assert program.fingerprint is not None
    data = json.loads(json.dumps(program.fingerprint.to_json()))
    assert Fingerprint.from_json(data) == program.fingerprint
    data["code"][key] = "0123"
    object.__setattr__(program, "fingerprint", Fingerprint.from_json(data))
    with pytest.raises(ProgramFileError, match=f"{key}: 0123 in the program"):
        autopar.parallelize(small(), program=program)
    object.__setattr__(program, "fingerprint", None)
    with pytest.raises(ProgramFileError, match="does not say from which model it was compiled"):
        autopar.parallelize(small(), program=program)
