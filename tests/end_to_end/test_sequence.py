"""Sequence parallelism in real processes, with dropout, and in lower precision: every form, against the whole model."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan, Precision
from autopar.compiler import compile_program
from autopar.ir.program import Program
from autopar.models import gpt, llama
from autopar.simulate import simulate
from tests.against_one_process import difference, float64, whole
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-12
SIZES = llama.Config(vocab=64, context=48, width=32, layers=2, heads=8, kv_heads=4, ff=64)
FORMS = ("ring", "gather", "ulysses", "hybrid")


def train(mesh: str, plan: Plan, steps: int) -> dict[str, float]:
    """A few steps of SGD beside the unmodified model: the largest error of a loss, a gradient and a parameter."""
    model: nn.Module = float64(lambda: llama.Llama(SIZES).double())
    beside: nn.Module = float64(lambda: llama.Llama(SIZES).double())
    parallel = autopar.parallelize(model, Mesh.parse(mesh), plan)
    ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.05) for module in (parallel, beside))
    found = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    for step in range(steps):
        batch = llama.example_batch(SIZES, 4, 48, seed=step)
        loss = parallel.train_step(**batch)
        expected = beside(**batch)["loss"]
        expected.backward()
        found["loss"] = max(found["loss"], difference(loss, expected))
        gradients = dict(beside.named_parameters())
        for name, parameter in parallel.named_parameters():
            found["gradient"] = max(found["gradient"], difference(whole(parameter.grad), gradients[name].grad))
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    state = parallel.full_state_dict()
    pairs = ((state[name], tensor) for name, tensor in beside.named_parameters())
    found["parameter"] = max(difference(a, b) for a, b in pairs)
    return found


RUNS: list[tuple[str, dict[str, Any]]] = [
    *(("sp=2", {"attention": form}) for form in FORMS[:3]),
    ("sp=3", {"attention": "ring"}),
    *(("sp=4", {"attention": form}) for form in FORMS),
    ("dp=2,sp=2", {"attention": "ring", "zero": 3}),
    ("sp=2,tp=2", {"attention": "ulysses", "sequence": "megatron"}),
    ("pp=2,sp=2", {"attention": "ring", "microbatches": 2}),
    ("dp=2,sp=2,tp=2", {"attention": "ring", "zero": 2}),
]


FAST = (3, 8)


@pytest.mark.parametrize(
    ("mesh", "choices"), slow_but(FAST, RUNS), ids=[f"{mesh}-{given['attention']}" for mesh, given in RUNS]
)
def test_real_ranks(mesh: str, choices: dict[str, Any]) -> None:
    parsed = Mesh.parse(mesh)
    plan = Plan(check_numerics=False, **choices)
    for found in run_ranks(train, parsed.world_size, mesh, plan, 3, timeout=300):
        assert max(found.values()) <= EXACT, found


def steps_and_outputs(mesh: str, plan: Plan) -> tuple[float, list[str], list[str], float]:
    """A step's loss and its collectives, then those of a call, and how far its logits are from the whole model's."""
    model: nn.Module = float64(lambda: llama.Llama(SIZES).double())
    beside: nn.Module = float64(lambda: llama.Llama(SIZES).double())
    parallel = autopar.parallelize(model, Mesh.parse(mesh), plan)
    batch = llama.example_batch(SIZES, 4, 48)
    expected = beside(**batch)
    error = difference(parallel.train_step(**batch), expected["loss"])
    names = [entry.name for entry in parallel.traffic]
    with torch.no_grad():
        found = parallel(**batch)
    more = [entry.name for entry in parallel.traffic]
    logits = found["logits"]
    return error, names, more, 0.0 if logits is None else difference(whole(logits), expected["logits"])


@pytest.mark.parametrize(("mesh", "microbatches"), slow_but([0, 1], [("sp=2", 1), ("sp=2", 2), ("pp=2,sp=2", 2)]))
def test_a_training_step_does_not_make_the_other_outputs(mesh: str, microbatches: int) -> None:
    """Logits in plain order are sent between ranks where the user gets them, and only there."""
    plan = Plan(check_numerics=False, attention="ring", microbatches=microbatches, zero=0 if "pp" in mesh else 1)
    for error, names, more, logits in run_ranks(steps_and_outputs, Mesh.parse(mesh).world_size, mesh, plan):
        assert error <= EXACT and logits <= EXACT
        assert "reorder" not in names and ("shift" in names or "pp" in mesh)
        assert "reorder" in more or "pp" in mesh


# ---------------------------------------------------------------- dropout, precision


def losses_and_gradients(model: nn.Module, batch: dict[str, Tensor], mesh: Mesh, plan: Plan) -> tuple[Tensor, Any]:
    program = compile_program(model, mesh, plan, (), batch)
    assert isinstance(program, Program)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = simulate(program, state, (), batch)
    assert found.loss is not None
    return found.loss, found.grads


@pytest.mark.parametrize("mesh", ["sp=2", "sp=3", "dp=2,sp=2", "sp=2,tp=2"])
def test_dropout_draws_the_masks_of_one_rank(mesh: str) -> None:
    """Of embeddings, residuals and attention; attention with dropout is written out, each rank has its rows."""
    sizes = gpt.Config(vocab=32, context=12, width=16, layers=2, heads=4, dropout=0.25)
    model: nn.Module = float64(lambda: gpt.GPT(sizes).double().train())
    batch = gpt.example_batch(sizes, 4, 12)
    alone, gradients = losses_and_gradients(model, batch, Mesh(), Plan(check_numerics=False))
    loss, found = losses_and_gradients(model, batch, Mesh.parse(mesh), Plan(check_numerics=False))
    assert difference(loss, alone) <= EXACT
    assert max(difference(found[name], gradient) for name, gradient in gradients.items()) <= EXACT


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_no_worse_than_on_one_rank(form: str) -> None:
    """Errors against float64, of loss and gradients in bfloat16: merging tiles must not add to them."""
    model: nn.Module = float64(lambda: llama.Llama(SIZES).float())
    batch = llama.example_batch(SIZES, 4, 48)
    exact: nn.Module = float64(lambda: llama.Llama(SIZES).double())
    expected = exact(**batch)["loss"]
    expected.backward()
    truth = {name: parameter.grad for name, parameter in exact.named_parameters()}

    def errors(mesh: Mesh, **choices: Any) -> tuple[float, float]:
        plan = Plan(check_numerics=False, precision=Precision("bfloat16", "float32"), **choices)
        loss, found = losses_and_gradients(model, batch, mesh, plan)
        norms = [(found[name].double() - gradient).norm() / gradient.norm() for name, gradient in truth.items()]
        return abs(float(loss) - expected.item()), max(map(float, norms))

    alone, split = errors(Mesh()), errors(Mesh(sp=4), attention=form)
    assert split[0] <= 2 * alone[0] + 2.0**-9 and split[1] <= 1.5 * alone[1], (alone, split)


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="8 processes on one core")
def test_eight_ranks_for_many_steps() -> None:
    for found in run_ranks(train, 8, "dp=2,sp=2,tp=2", Plan(check_numerics=False, zero=3), 50, timeout=900):
        assert max(found.values()) <= 50 * EXACT, found
