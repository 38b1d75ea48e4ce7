"""Mixtures of experts with their batch split, by every axis and ZeRO stage: each number is exact, and ZeRO's bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, Reference
from autopar.frontend.numerics import promote_float32
from autopar.zoo.named import Example, named_model
from tests.against_one_process import Errors, worst
from tests.end_to_end.test_training import train
from tests.launch import run_ranks
from tests.selection import slow_but

pytest.importorskip("transformers")

ROWS = 12
MESHES = ("ep=1", "ep=2", "ep=3", "dp=2,ep=2", "dp=2,ep=3", "ep=2,sp=2", "ep=2,tp=2", "pp=2,ep=2")


SMALL: dict[str, dict[str, Any]] = {"gpt2": {"n_layer": 2}, "t5": {"num_layers": 2}}


def example(name: str, seed: int = 0) -> Example:
    return named_model(f"hf:{name}", SMALL.get(name, {"num_hidden_layers": 2}), batch=ROWS, seed=seed)


@cache
def reference(name: str) -> Reference:
    return Reference(example(name).model, example(name).batch)


@pytest.mark.parametrize("zero", slow_but([0, 3], range(4)))
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_the_model(mesh: str, zero: int) -> None:
    on = Mesh.parse(mesh)
    plan = Plan(zero=zero, microbatches=2 if on.is_pipelined else 1, check_numerics=False)
    report = reference("mixtral").check(on, plan)
    assert report.worst <= TOLERANCE, report


# ---------------------------------------------------------------- the formulas of ZeRO


@pytest.mark.parametrize("mesh", slow_but([1], ["dp=2", "dp=3", "dp=2,sp=2", "dp=2,tp=2"]))
@pytest.mark.parametrize("name", slow_but([0, 3], ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]))
def test_no_byte_of_experts_more_than_the_formulas(name: str, mesh: str) -> None:
    """Rajbhandari et al. 2020, sections 5 and 7, P bytes on n ranks: P/n held; 2, 2, 2 or 3 times P (n-1)/n sent."""
    on = Mesh.parse(mesh)
    sharding = on.shard_axis()
    assert sharding is not None
    n = on.size(sharding)
    parts = held(reference(name).program(on)).rank  # what tp leaves of P
    share = parts * (n - 1) / n
    for zero in (0, 1, 2, 3) if name == "mixtral" else (0, 2, 3):
        report = reference(name).check(on, Plan(zero=zero, check_numerics=False))
        assert report.worst <= TOLERANCE, (zero, report)
        assert held(report.program).rank == (parts / n if zero else parts)
        traffic = [t for t in report.step.traffic if t.axis == sharding and t.bytes > 100]  # without the loss
        counted = {(t.phase, t.name): t.bytes for t in traffic}
        first = counted.pop(("forward", "all_gather"), 0)
        again = counted.pop(("backward", "all_gather"), 0)
        assert counted == {("backward", "reduce_scatter"): share} if zero else {("backward", "all_reduce"): 2 * share}
        assert first == (share if zero else 0) and (0.9 * share <= again <= share if zero == 3 else not again)
        foreseen = [t for t in sent(report.program) if t.axis == sharding and t.bytes > 100]
        assert sum(t.bytes for t in foreseen) == sum(t.bytes for t in traffic), "and said before it runs"


@pytest.mark.parametrize("mesh", slow_but([1], ["dp=3", "dp=2,sp=2", "dp=2,tp=2", "dp_replicate=2,dp_shard=2"]))
@pytest.mark.parametrize("name", slow_but([1], ["llama", "gpt2", "t5"]))
def test_dense_models_equal_themselves(name: str, mesh: str) -> None:
    for zero in (1, 3):
        report = reference(name).check(Mesh.parse(mesh), Plan(zero=zero, check_numerics=False))
        assert report.worst <= TOLERANCE, (zero, report)
        reduced = [t for t in report.step.traffic if t.phase == "backward" and "dp" in t.axis.split("+")]
        whole = sum(t.bytes for t in reduced if t.name == "all_reduce")
        assert whole <= 0.03 * sum(t.bytes for t in reduced), "rows of positions, the loss"


# ---------------------------------------------------------------- real ranks


def build() -> nn.Module:
    return example("mixtral").model


def train_experts(mesh: str, zero: int) -> Errors:
    batches: list[dict[str, Tensor]] = [example("mixtral", seed).batch for seed in range(4)]
    with promote_float32():  # in which mixtral computes its router
        return train(build, batches, Mesh.parse(mesh), Plan(zero=zero, check_numerics=False), "adamw")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "zero"), slow_but([1], [("dp=2", 3), ("dp=2,ep=2", 3), ("ep=2", 1)]))
def test_training_experts_equals_one_process(mesh: str, zero: int) -> None:
    for errors in run_ranks(train_experts, Mesh.parse(mesh).world_size, mesh, zero):
        assert worst(errors) < (1e-9, ""), worst(errors)
        assert worst({key: e for key, e in errors.items() if key.endswith(" 0")}) < (1e-12, ""), "before any step"
