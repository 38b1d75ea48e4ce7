"""Data-like axes together on real gloo ranks, dp x sp: one reduction of gradients, and ZeRO over all of them.

Most models are such that no token meets another: ``tests/token_split.py`` has them, and the pass that splits ``sp``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import Checkpoints, Mesh, Plan
from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, Reference
from autopar.dtensors.dtensor import local_of
from autopar.zoo.named import named_model
from tests.against_one_process import Errors, compare_gradients, float64, worst
from tests.checkpoint.test_checkpoints import everything, same, steps
from tests.end_to_end.test_training import TRAINED, train
from tests.launch import run_ranks
from tests.selection import slow_but
from tests.token_split import OddTokens, TokenWise, token_batch, tokens_split
from tests.traffic import sent_since

MODELS: dict[str, type[nn.Module]] = {"even": TokenWise, "odd": OddTokens}
BATCHES = [token_batch(seed=seed) for seed in range(6)]
SIMULATED = (
    "dp=2,sp=2", "dp=1,sp=2", "dp=2,sp=1", "dp=3,sp=2", "dp=2,sp=3", "dp=4,sp=2", "dp=2,sp=2,tp=2",
    "dp_replicate=2,dp_shard=1,sp=2", "dp_replicate=2,dp_shard=2,sp=2",
)  # fmt: skip


# ---------------------------------------------------------------- simulated: numbers, and the formulas


@pytest.mark.parametrize("name", slow_but([1], MODELS))
def test_equals_the_model(name: str) -> None:
    reference = Reference(MODELS[name](), BATCHES[0])
    for mesh, zero in zip(SIMULATED * 2, itertools.cycle(range(4))):  # two of the four each
        with tokens_split():
            report = reference.check(Mesh.parse(mesh), Plan(zero=zero, on_indivisible="replicate"))
        assert report.worst <= TOLERANCE, (mesh, zero, report)


@pytest.mark.parametrize(
    "mesh", slow_but([1, 4], ["dp=2,sp=2", "dp=1,sp=4", "dp=4,sp=1", "dp=2,sp=4", "dp_replicate=2,dp_shard=2,sp=2"])
)
def test_no_byte_more_than_the_formulas_for_all_ranks_together(mesh: str) -> None:
    """Rajbhandari et al. 2020, sections 5 and 7, of n ranks: memory 1/n, traffic 2 or 3 times (n - 1)/n."""
    model, on = TokenWise(width=16, tokens=32), Mesh.parse(mesh)
    reference, size = Reference(model, BATCHES[0]), sum(parameter.numel() for parameter in model.parameters()) * 8
    n, replicas = on.size(on.shard_axis() or "dp"), on.size("dp_replicate")
    share, rest = (n - 1) / n, 2 * (replicas - 1) / replicas / n
    for zero, times in ((1, 2), (2, 2), (3, 3)):
        with tokens_split():
            report = reference.check(on, Plan(zero=zero))
        counted = sum(t.bytes for t in report.step.traffic if t.bytes > 100)  # without the loss and the count
        assert held(report.program).rank * n == held(report.program).whole == size
        saved = model.tokens.weight.numel() * 8 * share if zero == 3 else 0  # lies ready from forward's end
        assert times * size * share - saved <= counted - rest * size <= times * size * share, (zero, counted / size)
        assert sum(t.bytes for t in sent(report.program) if t.bytes > 100) == counted, "and said before it runs"


@pytest.mark.parametrize("mesh", slow_but([0], ["dp=2,sp=2", "dp=1,sp=4", "dp_replicate=2,dp_shard=2,sp=2"]))
def test_a_transformer_sends_what_the_formulas_say_besides_its_keys_and_values(mesh: str) -> None:
    example, on = named_model("llama", batch=4), Mesh.parse(mesh)
    reference, size = Reference(example.model, example.batch), 0
    sharding = on.shard_axis()
    assert sharding is not None
    n, size = on.size(sharding), sum(parameter.numel() for parameter in reference.model.parameters()) * 8
    for zero in range(4):
        report = reference.check(on, Plan(zero=zero, attention="ulysses"))
        assert report.worst <= TOLERANCE, (zero, report)
        assert held(report.program).rank * (n if zero else 1) == size
        whole = [t for t in report.step.traffic if t.phase == "backward" and t.name in ("all_reduce", "reduce_scatter")]
        counts = {(t.axis, t.name): t.bytes for t in whole}
        over, rest = on.merged(["dp", "dp_replicate", "dp_shard", "sp"]), on.size("dp_replicate") - 1
        parts = {(sharding, "reduce_scatter"): (n - 1) * size // n}
        parts |= {("dp_replicate", "all_reduce"): size // n} if rest else {}
        assert counts == (parts if zero else {(over, "all_reduce"): 2 * (on.world_size - 1) * size // on.world_size})


# ---------------------------------------------------------------- real ranks


def train_stages(name: str, mesh: Mesh, stages: tuple[int, ...], plan: dict[str, Any]) -> list[Errors]:
    with tokens_split():
        plans = [Plan(zero=zero, check_numerics=False, on_indivisible="replicate", **plan) for zero in stages]
        return [train(MODELS[name], BATCHES[:4], mesh, one, "adamw") for one in plans]


def train_llama(mesh: Mesh, stages: tuple[int, ...], plan: dict[str, Any]) -> list[Errors]:
    plans = [Plan(zero=zero, check_numerics=False, **plan) for zero in stages]
    return [train(*TRAINED["llama"], mesh, one, "sgd") for one in plans]


@pytest.mark.parametrize(
    ("name", "mesh", "stages", "plan"),
    slow_but(
        [2],
        [
            ("even", "dp=2,sp=2", (0, 1, 3), {}),
            ("odd", "dp=2,sp=2", (0, 2, 3), {}),
            ("odd", "dp_replicate=2,dp_shard=1,sp=2", (3,), {"bucket_mb": 0}),
            ("even", "dp=1,sp=2", (3,), {"overlap_mb": 0}),
        ],
    ),
)
def test_training_equals_one_process(name: str, mesh: str, stages: tuple[int, ...], plan: dict[str, Any]) -> None:
    """With clipping by torch's own function, two batches for the first step, and whole state dicts at the end."""
    on = Mesh.parse(mesh)
    for rank, rows in enumerate(run_ranks(train_stages, on.world_size, name, on, stages, plan)):
        for zero, errors in zip(stages, rows):
            assert worst(errors) < (TOLERANCE, ""), (rank, zero, worst(errors))


@pytest.mark.parametrize(("attention", "stages"), slow_but([1], [("ring", (0, 3)), ("ulysses", (1,))]))
def test_training_a_transformer_equals_one_process(attention: str, stages: tuple[int, ...]) -> None:
    for rows in run_ranks(train_llama, 4, Mesh(dp=2, sp=2), stages, {"attention": attention}):
        for zero, errors in zip(stages, rows):
            assert worst(errors) < (TOLERANCE, ""), (zero, worst(errors))


def look_at_parameters(zero: int) -> tuple[list[Any], dict[str, int], float]:
    """Of each parameter the mesh, placements and rows here; bytes sent in a step by axis; an own norm of gradients."""
    with tokens_split():
        model = autopar.parallelize(
            float64(OddTokens), Mesh(dp=2, sp=2), Plan(zero=zero, check_numerics=False), example_inputs=BATCHES[0]
        )
        before = model.traffic
        model.train_step(**BATCHES[0])
    sent_by_axis: dict[str, int] = {}
    for transfer in sent_since(before, model.traffic):
        sent_by_axis[transfer.axis] = sent_by_axis.get(transfer.axis, 0) + transfer.bytes
    found = []
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole, grad = parameter.full_tensor(), parameter.grad
        assert grad is None or grad.full_tensor().equal(model.full_grads()[name])
        assert whole.equal(model.full_state_dict()[name])
        names, shape = parameter.device_mesh.mesh_dim_names, tuple(local_of(parameter).shape)
        found.append((name, names, str(parameter.placements), shape))
    return found, sent_by_axis, float(model.clip_grad_norm_(1.0))


def test_parameters_are_dtensors_with_one_dim_for_all_data_like_axes() -> None:
    reference = float64(OddTokens)
    reference(**BATCHES[0])["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    found = run_ranks(look_at_parameters, 4, 3)
    assert all(names == ("dp_sp",) for rows, _, _ in found for _, names, _, _ in rows)
    biases = [next(row[2:] for row in rows if row[0] == "down.bias") for rows, _, _ in found]
    assert [shape for _, shape in biases] == [(2,), (2,), (1,), (0,)] and "Shard(dim=0)" in biases[0][0]
    assert all(by_axis.keys() == {"dp+sp"} for _, by_axis, _ in found)
    assert all(abs(own / float(norm) - 1) < 1e-12 for _, _, own in found)
    whole = run_ranks(look_at_parameters, 4, 0)
    assert all(names == ("dp", "sp") for rows, _, _ in whole for _, names, _, _ in rows)
    assert all(abs(own / float(norm) - 1) < 1e-12 for _, _, own in whole)


def count_reductions(zero: int, microbatches: int) -> dict[tuple[str, str], int]:
    """Bytes sent in the backward passes of a step in parts, by axis and collective,."""
    with tokens_split():
        plan = Plan(zero=zero, microbatches=microbatches, check_numerics=False)
        model = autopar.parallelize(float64(TokenWise), Mesh(dp=2, sp=2), plan)
        reference = float64(TokenWise)
        model.train_step(**BATCHES[0])
    reference(**BATCHES[0])["loss"].backward()
    assert worst(compare_gradients(model, reference)) < (TOLERANCE, "")
    return {(t.axis, t.name): t.bytes for t in model.traffic if t.phase == "backward"}


@pytest.mark.slow
def test_microbatches_are_reduced_once() -> None:
    for zero in (0, 1):
        once, thrice = (run_ranks(count_reductions, 4, zero, parts)[0] for parts in (1, 3))
        assert once == thrice and once.keys() == {("dp+sp", "reduce_scatter" if zero else "all_reduce")}


JOURNEY = (("dp=4", 3), ("dp=2,sp=2", 3), ("dp_replicate=2,dp_shard=1,sp=2", 1), ("dp=2,sp=2", 0), ("dp=1,sp=2", 2))


def leg(name: str, mesh: str, zero: int, directory: Path) -> tuple[Any, Any, list[float]]:
    """Load the latest checkpoint and the weights beside it, train one step, save both."""
    with tokens_split():
        plan = Plan(zero=zero, check_numerics=False, on_indivisible="replicate")
        model = autopar.parallelize(float64(MODELS[name]), Mesh.parse(mesh), plan, example_inputs=BATCHES[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        checkpoints = Checkpoints(directory)
        resumed = checkpoints.load(model, optimizer, scheduler=scheduler)
        position = resumed.data["position"] if resumed else 0
        before = everything(model, optimizer) if resumed else None
        if resumed:
            with torch.no_grad():
                for parameter in model.parameters():
                    local_of(parameter).zero_()
            autopar.load_safetensors(model, directory / f"weights {position}")
            assert before is not None and same(everything(model, optimizer), before)
        losses = steps(model, optimizer, scheduler, BATCHES[position : position + 1])
    checkpoints.save(position + 1, model, optimizer, scheduler=scheduler, data={"position": position + 1})
    autopar.save_safetensors(model, directory / f"weights {position + 1}")
    return before, everything(model, optimizer), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_from_mesh_to_mesh(name: str, tmp_path: Path) -> None:
    model = float64(MODELS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = steps(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), BATCHES[: len(JOURNEY)])
    saved = None
    for position, (mesh, zero) in enumerate(JOURNEY):
        results = run_ranks(leg, Mesh.parse(mesh).world_size, name, mesh, zero, tmp_path)
        for before, after, losses in results:
            assert (before is None) == (saved is None) and (before is None or same(before, saved)), (mesh, zero)
            assert abs(losses[0] / expected[position] - 1) < 1e-12 and same(after, results[0][1]), (mesh, zero)
        saved = results[0][1]


def initialise(mesh: str, zero: int, directory: Path) -> Any:
    """The weights of a model built on the meta device, by its own initialisation."""
    with tokens_split():
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            model = TokenWise()
        parallel = autopar.parallelize(
            model, Mesh.parse(mesh), Plan(zero=zero, check_numerics=False), example_inputs=BATCHES[0]
        )
        autopar.load_safetensors(parallel, directory, seed=3)
        return parallel.full_state_dict()


@pytest.mark.slow
def test_initialisation_is_the_same_on_any_mesh(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"norms.0.bias": torch.arange(8.0, dtype=torch.float64)}, tmp_path / "model.safetensors")
    first, second = (run_ranks(initialise, 4, mesh, 3, tmp_path)[0] for mesh in ("dp=2,sp=2", "dp=4"))
    assert same(first, second) and float(first["up.0.weight"].std()) > 0


def train_long(mesh: Mesh, plan: Plan, count: int) -> tuple[list[float], Any]:
    with tokens_split():
        model = autopar.parallelize(float64(OddTokens), mesh, plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
        losses = []
        for step in range(count):
            losses.append(float(model.train_step(**BATCHES[step % len(BATCHES)])))
            optimizer.step()
            optimizer.zero_grad()
        return losses, model.full_state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_hundreds_of_steps(zero: int) -> None:
    """Everything overlaps and lies in small buckets; afterwards the weights are those of one process."""
    count, reference = 300, float64(OddTokens)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.02, momentum=0.5)
    expected = []
    for step in range(count):
        loss = reference(**BATCHES[step % len(BATCHES)])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    plan = Plan(zero=zero, bucket_mb=0.0005, overlap_mb=0.0, check_numerics=False, on_indivisible="replicate")
    for losses, weights in run_ranks(train_long, 4, Mesh(dp=2, sp=2), plan, count):
        assert max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)) < TOLERANCE
        assert all(
            float((weights[name] - p.detach()).abs().max()) < TOLERANCE for name, p in reference.named_parameters()
        )
