"""Each rank passes its part of a batch (``Plan(inputs="local")``) and gets its part of the outputs, on gloo processes.

All in float64 against the unmodified model on the whole batch.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import autopar
from autopar import Mesh, Plan
from autopar.data.parts import part_of_batch
from autopar.errors import IndivisibleError, TraceError
from autopar.frontend.numerics import promote_float32
from autopar.ir.loss import loss_of
from tests import hugging_face
from tests.against_one_process import Errors, difference, worst
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-12
Case = tuple[str, str, dict[str, Any]]  # model, further inputs, choices of the plan


def batch_of(name: str, more: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, batch = hugging_face.build(name)
    rows, length = batch["input_ids"].shape
    if more == "mask":
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 11:] = 0
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    if more == "packed":
        batch["position_ids"] = torch.tensor([[*range(7), *range(9)], [*range(12), *range(4)]])
    if more == "shorter":
        batch["labels"] = batch["labels"][:, : length // 2].contiguous()
    if more == "embeds":
        batch.pop("input_ids")
        batch["inputs_embeds"] = torch.randn(rows, length, 64, dtype=torch.float64, requires_grad=True)
    return model, batch


def run(mesh: Mesh, cases: list[Case]) -> list[tuple[Errors, list[str]]]:
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    with promote_float32():  # the casts in the models themselves
        return [_run(mesh, *case) for case in cases]


def _run(mesh: Mesh, name: str, more: str, choices: dict[str, Any]) -> tuple[Errors, list[str]]:
    """Errors of loss, outputs and all gradients, and how the outputs are held."""
    model, batch = batch_of(name, more)
    reference = copy.deepcopy(model)
    plan = Plan(inputs="local", check_numerics=False, **choices)
    parallel = autopar.parallelize(model, mesh, plan)
    part = {key: x.detach().requires_grad_(x.requires_grad) for key, x in part_of_batch(batch, mesh, plan).items()}
    if plan.microbatches > 1:
        loss, outputs = parallel.train_step(**part), {}
        with torch.no_grad():
            outputs = dict(parallel(**part).items()) if mesh.is_pipelined else {}
    else:
        outputs = dict(parallel(**part).items())
        loss = loss_of(outputs)
        loss.backward()
    expected = reference(**batch)
    loss_of(expected).backward()
    errors = {"loss": difference(loss, loss_of(expected))} | _gradients(parallel, reference)
    for key, found in outputs.items():
        if isinstance(found, Tensor) and key != "loss":
            errors[key] = difference(found, expected[key])
    if more == "embeds":
        whole = part_of_batch({"inputs_embeds": batch["inputs_embeds"].grad}, mesh, plan)
        errors["embeds"] = difference(part["inputs_embeds"].grad, whole["inputs_embeds"])
    return errors, [repr(x.placements) for x in outputs.values() if isinstance(x, DTensor)]


def _gradients(parallel: Any, reference: nn.Module) -> Errors:
    """Errors relative to the model's largest gradient."""
    expected = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    found, largest = parallel.full_grads(), max(float(grad.abs().max()) for grad in expected.values())
    assert set(found) == set(expected)
    return {f"grad {key}": float((found[key] - grad).abs().max()) / largest for key, grad in expected.items()}


def check(mesh: str, *cases: Case) -> list[list[str]]:
    parsed = Mesh.parse(mesh)
    placements: list[list[str]] = []
    for found in run_ranks(run, parsed.world_size, parsed, list(cases), timeout=400):
        for errors, _ in found:
            assert worst(errors) < (EXACT, ""), sorted(errors.items(), key=lambda item: -item[1])[:5]
        placements = [placed for _, placed in found]
    return placements


@pytest.mark.slow
def test_of_two_ranks() -> None:
    found = check(
        "sp=2",
        ("llama", "", {}),
        ("llama", "packed", {"attention": "ring"}),
        ("llama", "embeds", {"attention": "ring"}),
        ("llama", "mask", {"zero": 3}),
        ("bert", "mask", {}),
        ("t5", "shorter", {}),
        ("bart", "mask", {"attention": "ulysses"}),
    )
    assert all(placed and all(repr(Shard(1)) in each for each in placed) for placed in found), found


@pytest.mark.parametrize("mesh", slow_but([], ["dp=2,sp=2", "sp=4", "sp=2,tp=2"]))
def test_of_four_ranks(mesh: str) -> None:
    sequence = {"sequence": "megatron"} if "tp" in mesh else {"zero": 3}
    found = check(mesh, ("llama", "", {}), ("llama", "packed", sequence), ("bert", "mask", {}), ("llama", "embeds", {}))
    assert all(placed for placed in found)


@pytest.mark.slow
def test_with_a_pipeline() -> None:
    check("pp=2,sp=2", ("llama", "", {"microbatches": 2}), ("t5", "shorter", {"microbatches": 2}))


def wrong(lengths: tuple[int, int], extra: str) -> tuple[str, str]:
    mesh = Mesh(sp=2)
    model, batch = hugging_face.build("llama", torch.float32)
    parallel = autopar.parallelize(model, mesh, Plan(inputs="local", check_numerics=False))
    length = lengths[parallel._connection.rank]
    part = {key: tensor[:, :length] for key, tensor in batch.items()}
    if extra:
        part["position_ids"] = torch.arange(16).expand(2, 16)
    try:
        parallel(**part)
    except (IndivisibleError, TraceError) as problem:
        return type(problem).__name__, str(problem)
    return "", ""


def test_parts_that_do_not_fit() -> None:
    for kind, text in run_ranks(wrong, 2, (8, 6), ""):
        assert kind == "IndivisibleError" and "'input_ids'" in text and "[2, 8]" in text and "[2, 6]" in text
        assert "axis 'sp'" in text and "Way out" in text and len(text.splitlines()) < 15
    for kind, text in run_ranks(wrong, 2, (8, 8), "whole"):
        assert kind == "TraceError" and "position_ids [2, 32] of a part [2, 16]" in text
        assert "input_ids [2, 16] of a part [2, 8]" in text and "Plan(sequence_dims=" in text
        assert len(text.splitlines()) < 15, text
