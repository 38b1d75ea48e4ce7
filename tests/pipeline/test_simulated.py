"""Pipelines on simulated ranks against the unmodified model in float64: loss, outputs and every gradient.

One ``Reference`` serves all rows of a model: it keeps its traces. Batches of 14 or 19 rows are uneven for almost any
number of microbatches.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.api import parallelize
from autopar.check import Reference, Report
from autopar.compiler import compile_program
from autopar.errors import InvariantError
from autopar.frontend.numerics import gradient_error
from autopar.ir.program import PipelinedProgram
from autopar.mesh import Mesh
from autopar.models import moe
from autopar.pipeline.stages import crossings, types_of
from autopar.plan import Plan
from autopar.simulate import simulate
from tests import hugging_face
from tests.selection import slow_but

ROWS = 14
OURS = ("llama", "gpt", "t5", "vit", "mlp", "moe")
MODELS = (*OURS, "hf:llama", "hf:gpt2")
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved-1": {"schedule": "interleaved", "virtual_stages": 1},
    "interleaved-2": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-h1": {"schedule": "zb-h1"},
    "zb-v": {"schedule": "zb-v"},
    "dualpipe-v": {"schedule": "dualpipe-v"},
}


@lru_cache(maxsize=3)
def reference(name: str, rows: int = ROWS) -> Reference:
    torch.manual_seed(0)
    if name.startswith("hf:"):
        model, few = hugging_face.build(name[3:])
        times = -(-rows // hugging_face.BATCH)
        batch = {key: torch.cat([tensor] * times)[:rows] for key, tensor in few.items()}
        generator = torch.Generator().manual_seed(1)
        batch["input_ids"] = torch.randint(3, hugging_face.VOCABULARY, batch["input_ids"].shape, generator=generator)
        batch["labels"] = batch["input_ids"].where(batch["labels"] != -100, -100)
    else:
        module = importlib.import_module(f"autopar.models.{name}")
        model = module.build()
        batch = module.example_batch(model, rows)
    return Reference(model, batch)


def passed(report: Report) -> bool:
    assert report.step.loss is not None and isinstance(report.program, PipelinedProgram)
    return report.passed


COVERING = [  # every model, every schedule, every p, every kind of m
    ("llama", "1f1b", 2, 2), ("llama", "zb-v", 2, 5), ("llama", "interleaved-2", 2, 4),
    ("gpt", "gpipe", 2, 5), ("gpt", "zb-h1", 4, 4), ("gpt", "dualpipe-v", 3, 6),
    ("t5", "interleaved-1", 3, 3), ("vit", "zb-h1", 3, 3), ("vit", "zb-v", 4, 9), ("mlp", "interleaved-2", 4, 9),
    ("mlp", "dualpipe-v", 1, 2), ("moe", "1f1b", 3, 6), ("hf:gpt2", "zb-v", 2, 4),
]  # fmt: skip
PLANS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt", "pp=2,dp=2", {"zero": 0, "recompute": "full"}), ("gpt", "pp=2,dp=2", {"zero": 1}),
    ("gpt", "pp=2,dp=2", {"zero": 2, "schedule": "zb-h1"}), ("gpt", "pp=2,dp=2", {"zero": 3}),
    ("llama", "pp=2,dp=2,tp=2", {"zero": 1}), ("llama", "pp=2,tp=2", {"sequence": "megatron", "schedule": "zb-v"}),
]  # fmt: skip
MORE_PLANS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "pp=2", {"recompute": how, "schedule": "zb-v"}) for name in OURS for how in ("full", "selective")),
    *((name, "pp=2,dp=2", {"zero": zero, "schedule": "zb-h1"}) for name in ("llama", "t5") for zero in range(4)),
    *((name, "pp=2,dp=2,tp=2", {"zero": zero}) for name in ("llama", "gpt", "t5", "vit", "mlp") for zero in (0, 1)),
    *((name, "pp=2,dp=2,tp=2", {"zero": 3, "schedule": "interleaved"}) for name in ("llama", "gpt")),
    *((name, "pp=3,tp=2", {"sequence": "megatron"}) for name in ("llama", "gpt", "t5")),
]


@pytest.mark.parametrize(("name", "schedule", "p", "m"), slow_but([1, 3, 5, 6, 7, 9, 11], COVERING))
def test_the_unmodified_model(name: str, schedule: str, p: int, m: int) -> None:
    report = reference(name).check(Mesh(pp=p), Plan(microbatches=m, **SCHEDULES[schedule]))
    assert passed(report), report.worst
    assert sum(stage.loss is not None for stage in report.program.stages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_and_size(name: str, schedule: str) -> None:
    for p in (1, 2, 3, 4):
        for m in (p, 2 * p, 2 * p + 1):
            report = reference(name, 19).check(Mesh(pp=p), Plan(microbatches=m, **SCHEDULES[schedule]))
            assert passed(report), (p, m, report.worst)


@pytest.mark.parametrize(("name", "mesh", "plan"), slow_but([0, 3, 5], PLANS))
def test_other_axes_and_choices(name: str, mesh: str, plan: dict[str, Any]) -> None:
    report = reference(name).check(Mesh.parse(mesh), Plan(microbatches=3, **plan))  # per rank of dp 3, 2 and 2 rows
    assert passed(report), report.worst
    assert report.program.tail is not None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "plan"), MORE_PLANS)
def test_more_axes_and_choices(name: str, mesh: str, plan: dict[str, Any]) -> None:
    test_other_axes_and_choices(name, mesh, plan)


def test_recomputed_activations_are_not_kept() -> None:
    plans = [Plan(microbatches=2, schedule="gpipe", recompute=how) for how in ("none", "full")]
    reports = [reference("gpt").check(Mesh(pp=2), plan) for plan in plans]
    assert all(map(passed, reports))
    assert reports[1].step.peak_bytes[0] < reports[0].step.peak_bytes[0]


# ---------------------------------------------------------------- kinds of models

D = 8


class Net(nn.Module):
    """Six blocks; subclasses say what is special about them."""

    def __init__(self, blocks: int = 6, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(D) if norm else nn.Identity() for _ in range(blocks)])
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(D, 1)

    def body(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms):
            x = x + self.drop(torch.tanh(norm(block(x))))
        return x

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.head(self.body(x)).squeeze(-1)
        return {"loss": nn.functional.mse_loss(out, y), "out": out}


class Codes(Net):
    """An integer that one stage computes from activations is used by a later one; a parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, D)
        self.unused = nn.Parameter(torch.ones(3))

    def body(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.blocks[0](x))
        codes = (x.sum(-1) > 0).long()
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True)
        for block in list(self.blocks)[1:]:
            x = x + torch.tanh(block(x))
        return x / (1 + scale) + self.table(codes)


class Silent(Net):
    """No loss."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.body(x)).squeeze(-1)


def batch(rows: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(rows, D, generator=generator), "y": torch.randn(rows, generator=generator)}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-2", "zb-v"])
def test_integers_and_values_without_gradient_cross(schedule: str) -> None:
    report = Reference(seeded(Codes), batch()).check(Mesh(pp=3), Plan(microbatches=3, **SCHEDULES[schedule]))
    assert passed(report), report.worst
    crossing = list(crossings(report.program))
    assert any(set(one.names) - set(one.grads) for one in crossing)
    dtypes = {dtype for one in crossing for _, dtype in types_of(report.program, one).values()}
    assert torch.int64 in dtypes or torch.bool in dtypes


@pytest.mark.parametrize("schedule", slow_but([0, 2], ["1f1b", "zb-h1", "dualpipe-v"]))
@pytest.mark.parametrize("frozen", ["blocks.0", "blocks", "head"])
def test_frozen_parameters(schedule: str, frozen: str) -> None:
    model = seeded(Net)
    for parameter in model.get_submodule(frozen).parameters():
        parameter.requires_grad_(False)
    report = Reference(model, batch()).check(Mesh(pp=2), Plan(microbatches=3, **SCHEDULES[schedule]))
    assert passed(report), report.worst
    assert not any(name.startswith(f"{frozen}.") for name in report.step.grads)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved-2", "zb-v"])
def test_without_a_loss(schedule: str) -> None:
    model, given = seeded(Silent).eval(), {"x": batch()["x"].double()}
    mesh, plan = Mesh(pp=2), Plan(microbatches=3, check_numerics=False, **SCHEDULES[schedule])
    parallel = parallelize(copy.deepcopy(model), mesh, plan)
    with torch.no_grad():
        found = parallel.simulate(**given).output
        assert torch.allclose(found, model(**given), rtol=1e-12, atol=0)


def test_batch_norm_has_statistics_of_microbatches() -> None:
    model, given = seeded(lambda: Net(norm=True)), {n: t.double() for n, t in batch(8).items()}
    plan = Plan(microbatches=2, check_numerics=False)
    with pytest.raises(InvariantError, match=r"'norms.0' and 5 more normalise by .* each of 2 microbatches"):
        parallelize(copy.deepcopy(model), Mesh(pp=2), plan).simulate(**given)
    plan = replace(plan, microbatch_weights="statistics")
    step = parallelize(copy.deepcopy(model), Mesh(pp=2), plan).simulate(**given)
    halves = [model(**{name: tensor[rows] for name, tensor in given.items()}) for rows in (slice(4), slice(4, 8))]
    loss = (halves[0]["loss"] + halves[1]["loss"]) / 2
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert abs(float(step.loss / loss.detach()) - 1) < 1e-12
    assert max(gradient_error(step.grads, grads).values()) < 1e-10
    for name, buffer in model.named_buffers():  # one microbatch after the other has moved them
        assert torch.allclose(step.buffers[name], buffer, rtol=1e-12), name


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_dropout_masks(schedule: str) -> None:
    """The masks of the backward pass are those of the forward pass, and those of the same microbatch without pp."""
    model, given = seeded(lambda: Net(drop=0.5)), {n: t.double() for n, t in batch(9).items()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    plan = Plan(microbatches=3, check_numerics=False, **SCHEDULES[schedule])
    program = compile_program(model, Mesh(pp=2), plan, (), given)
    steps = [simulate(program, tensors, (), given, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(steps[0].loss, steps[1].loss) and not torch.equal(steps[0].loss, steps[2].loss)
    assert all(torch.equal(grad, steps[1].grads[name]) for name, grad in steps[0].grads.items())
    one = compile_program(model, Mesh(dp=1), Plan(check_numerics=False), (), {n: t[:3] for n, t in given.items()})
    parts = [
        simulate(one, tensors, (), {n: t[3 * i : 3 * i + 3] for n, t in given.items()}, seed=5 + i) for i in range(3)
    ]
    assert abs(float(sum(part.loss for part in parts) / 3 / steps[0].loss) - 1) < 1e-12
    wanted = {name: sum(part.grads[name] for part in parts) / 3 for name in steps[0].grads}
    assert max(gradient_error(steps[0].grads, wanted).values()) < 1e-10


def test_few_microbatches_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="2 microbatches for 4 pipeline ranks: schedule 1f1b has a bubble of 150%"):
        compile_program(seeded(Net), Mesh(pp=4), Plan(microbatches=2, check_numerics=False), (), batch())


@pytest.mark.parametrize("sizes, count", slow_but([1], [({"pp": 2}, 5), ({"pp": 2, "ep": 2}, 3)]), ids=["pp", "pp-ep"])
def test_a_loss_that_is_no_mean_counts_by_rows(sizes: dict[str, int], count: int) -> None:
    """The balance of a router, over each microbatch: the step of gradients accumulated by hand."""
    model = moe.build("tiny", layers=2, balance=0.02)
    reference = Reference(model, moe.example_batch(model, batch=18))
    report = reference.check(Mesh(**sizes), Plan(microbatches=count, microbatch_weights="rows"))
    assert report.worst < 1e-12
    assert reference.check(Mesh(**sizes)).worst < 1e-12, "one microbatch: the step of the whole batch"
    with pytest.raises(InvariantError, match="not made of sums and means over the rows"):
        reference.check(Mesh(**sizes), Plan(microbatches=count))
