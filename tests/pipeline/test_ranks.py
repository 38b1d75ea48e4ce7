"""Pipelines on real gloo processes: three steps beside the unmodified model, and a stage that dies in the middle."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from autopar import Mesh, Plan, parallelize
from autopar.errors import RankFailedError
from autopar.models import gpt
from autopar.runtime.rank_stage import StageStep
from tests.launch import run_ranks, try_ranks
from tests.pipeline.ranks import train
from tests.selection import slow_but

RUNS: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpt", "pp=2", {"schedule": "1f1b"}, "SGD"),
    ("gpt", "pp=2,dp=2", {"schedule": "interleaved", "zero": 1}, "SGD"),
    ("gpt", "pp=4", {"schedule": "zb-v"}, "SGD"),
]
MORE_RUNS: list[tuple[str, str, dict[str, Any], str]] = [
    *(("gpt", "pp=2", {"schedule": name}, "SGD") for name in ("gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v")),
    *(("gpt", "pp=4", {"schedule": name}, "SGD") for name in ("1f1b", "interleaved")),
    ("t5", "pp=2", {"schedule": "zb-v"}, "SGD"),
    ("moe", "pp=2", {"schedule": "zb-h1"}, "SGD"),
    ("gpt", "pp=2,dp=2,tp=2", {"zero": 1}, "AdamW"),
    ("llama", "pp=2,dp=2,tp=2", {"zero": 1, "schedule": "zb-v"}, "AdamW"),
    ("llama", "pp=2,dp=2,tp=2", {"zero": 3, "schedule": "interleaved"}, "SGD"),
    *(("gpt", "pp=2,dp=2,sp=2", {"zero": zero, "schedule": "1f1b"}, "SGD") for zero in (0, 3)),
]


@pytest.mark.parametrize(("name", "mesh", "plan", "optimizer"), slow_but([1], RUNS))
def test_three_steps(name: str, mesh: str, plan: dict[str, Any], optimizer: str) -> None:
    """Loss, gradients, their norm, parameters after three steps; seven rows for each rank of dp, so uneven parts."""
    sizes = dict(Mesh.parse(mesh).axes)
    rows = 7 * sizes.get("dp", 1)
    results = run_ranks(
        train, Mesh.parse(mesh).world_size, name, mesh, {"microbatches": 5, **plan}, rows, optimizer, timeout=400
    )
    for errors, _, _ in results:
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-10, (worst, errors[worst])
    holders = [held for _, held, _ in results if "head.weight" in held]
    assert all("tokens.weight" in held for held in holders) or name != "gpt", "tied, so it has both names"
    assert len(holders) > 1 or name != "gpt" or plan.get("schedule") in ("zb-v", "dualpipe-v")
    assert "pp" in {entry.axis for entry in results[0][2]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "plan", "optimizer"), MORE_RUNS)
def test_more_runs(name: str, mesh: str, plan: dict[str, Any], optimizer: str) -> None:
    test_three_steps(name, mesh, plan, optimizer)


def die(victim: int, mesh: str, schedule: str) -> str:
    """The error of a rank beside one that ends in its second step."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = gpt.build()
    plan = Plan(microbatches=4, schedule=schedule, timeout=10, check_numerics=False)
    parallel = parallelize(model, Mesh.parse(mesh), plan)
    given = gpt.example_batch(model, 8)
    parallel.train_step(**given)
    usual = StageStep.forward

    def dying(self: StageStep, number: int, received: Any) -> Any:
        if rank == victim and number == 2:
            os._exit(3)
        return usual(self, number, received)

    StageStep.forward = dying  # type: ignore[method-assign]
    try:
        parallel.train_step(**given)
    except RankFailedError as problem:
        return str(problem)
    return "no error"


@pytest.mark.parametrize(
    ("victim", "mesh", "schedule"),
    [(1, "pp=3", "1f1b"), pytest.param(3, "pp=2,dp=2", "zb-v", marks=pytest.mark.slow)],
)
def test_a_stage_that_ends_in_the_middle_of_a_step(victim: int, mesh: str, schedule: str) -> None:
    results = try_ranks(die, Mesh.parse(mesh).world_size, victim, mesh, schedule, timeout=120)
    assert results.pop(victim) is None
    for result in results:
        assert not isinstance(result, BaseException), result
        assert "waited in" in result and "a peer ended, or did not answer within 10 s" in result
