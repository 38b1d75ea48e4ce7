"""Experts with a limit in real processes: losses, gradients and parameters against a model that drops by the rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import autopar
from autopar import Mesh, Plan
from tests.against_one_process import compare_gradients, difference, float64
from tests.dropping import DroppingWithoutAuxiliary, ranks_of_tokens
from tests.launch import run_ranks
from tests.passes.test_route_experts import NoAuxiliary, batch
from tests.selection import slow_but

EXACT, EXPERTS, FACTOR = 1e-11, 10, 0.75


def train(mesh: str, plan: Plan, ranks: tuple[int, int, int]) -> tuple[dict[str, float], int]:
    """Two steps of SGD beside the model that drops: the largest errors, and how many choices were dropped."""
    parallel = autopar.parallelize(float64(partial(NoAuxiliary, EXPERTS, biased=True)), Mesh.parse(mesh), plan)
    beside = float64(partial(DroppingWithoutAuxiliary, EXPERTS, biased=True))
    assert isinstance(beside, DroppingWithoutAuxiliary)
    given, beside.factor = batch(), FACTOR
    beside.ranks = ranks_of_tokens(*given["ids"].shape, *ranks)
    ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.5) for module in (parallel, beside))
    found, dropped = {"loss": 0.0, "gradient": 0.0}, 0
    for _ in range(2):
        loss = parallel.train_step(**given)
        expected = beside(**given)["loss"]
        expected.backward()
        dropped += beside.dropped
        (load,) = parallel.expert_load().values()
        assert load.lost == beside.dropped and sum(load.experts) == 2 * given["ids"].numel()
        found["loss"] = max(found["loss"], difference(loss, expected))
        if not Mesh.parse(mesh).is_pipelined:  # else a rank has the gradients of its stage
            found["gradient"] = max(found["gradient"], *compare_gradients(parallel, beside).values())
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    state = parallel.full_state_dict()
    found["parameter"] = max(difference(state[key], tensor) for key, tensor in beside.named_parameters())
    return found, dropped


RUNS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("ep=3", {}, (3, 1, 1)),
    ("ep=2", {"microbatches": 3}, (6, 1, 1)),
    ("dp=2,ep=2", {"zero": 3, "recompute": "full"}, (4, 1, 1)),
    ("ep=2,tp=2", {"expert_axes": "ep"}, (2, 1, 1)),
    ("tp=2", {"expert_axes": "tp"}, (1, 1, 2)),
    ("pp=2,ep=2", {"microbatches": 2}, (4, 1, 1)),
]


@pytest.mark.parametrize(
    ("mesh", "choices", "ranks"), slow_but([5], RUNS), ids=[f"{mesh}-{len(plan)}" for mesh, plan, _ in RUNS]
)
def test_real_ranks(mesh: str, choices: dict[str, Any], ranks: tuple[int, int, int]) -> None:
    plan = Plan(check_numerics=False, capacity_factor=FACTOR, **choices)
    for found, dropped in run_ranks(train, Mesh.parse(mesh).world_size, mesh, plan, ranks, timeout=300):
        assert max(found.values()) <= EXACT, found
        assert dropped > 20
