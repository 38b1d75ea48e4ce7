"""Expert parallelism in real processes: losses, gradients and parameters against the unmodified model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.models import moe
from tests.against_one_process import compare_gradients, difference, float64
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-11
LAYERS, LENGTH = 2, 24
ROUTED = ("dispatch_rows", "return_rows")


def build() -> nn.Module:
    """Twelve experts and a loss of the router, so that statistics over the whole batch count."""
    return moe.build("tiny", layers=LAYERS, balance=0.05)


def batch(step: int, alike: bool) -> dict[str, Tensor]:
    found = moe.example_batch(moe.PRESETS["tiny"], 12, LENGTH, seed=step)
    return {**found, "input_ids": torch.full_like(found["input_ids"], 5 + step)} if alike else found


def train(mesh: str, plan: Plan, alike: bool) -> tuple[dict[str, float], list[tuple[str, str, int]]]:
    """A few steps of SGD beside the unmodified model: the largest errors, and the exchanges of one step."""
    model, beside = float64(build), float64(build)
    parallel = autopar.parallelize(model, Mesh.parse(mesh), plan)
    ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.05) for module in (parallel, beside))
    found = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    traffic: list[tuple[str, str, int]] = []
    for step in range(3):
        given = batch(step, alike)
        loss = parallel.train_step(**given)
        load = parallel.expert_load() if plan.record_load else {}
        assert all(sum(each.experts) == sum(each.ranks) == 2 * given["input_ids"].numel() for each in load.values())
        assert len(load) == LAYERS * plan.record_load
        traffic = traffic or [(t.phase, t.name, t.operations) for t in parallel.traffic if t.name in ROUTED]
        expected = beside(**given)["loss"]
        expected.backward()
        found["loss"] = max(found["loss"], difference(loss, expected))
        found["gradient"] = max(found["gradient"], *compare_gradients(parallel, beside).values())
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    state = parallel.full_state_dict()
    found["parameter"] = max(difference(state[key], tensor) for key, tensor in beside.named_parameters())
    return found, traffic


RUNS: list[tuple[str, dict[str, Any], bool]] = [
    ("ep=2", {}, False),
    ("ep=3", {"zero": 1}, True),  # of three ranks at least one gets no row
    ("ep=4", {"recompute": "full"}, False),
    ("dp=2,ep=2", {"zero": 1}, False),
    ("dp=2,ep=2", {"zero": 3}, False),
    ("ep=2,tp=2", {}, False),
    ("ep=2,tp=2", {"expert_axes": "ep", "zero": 2}, False),
    ("ep=2,sp=2", {"expert_axes": "ep+sp", "zero": 3}, True),
    ("dp=2,ep=2", {"zero": 3, "record_load": True, "expert_placement": {"*": tuple(range(11, -1, -1))}}, False),
    ("dp=2,ep=2,sp=2", {"zero": 2, "record_load": True}, False),
]


FAST = (1, 8)


@pytest.mark.parametrize(
    ("mesh", "choices", "alike"), slow_but(FAST, RUNS), ids=[f"{mesh}-{len(plan)}" for mesh, plan, _ in RUNS]
)
def test_real_ranks(mesh: str, choices: dict[str, Any], alike: bool) -> None:
    plan, ranks = Plan(check_numerics=False, **choices), Mesh.parse(mesh).world_size
    for found, traffic in run_ranks(train, ranks, mesh, plan, alike, timeout=300):
        assert max(found.values()) <= EXACT, found
        expected = [(phase, name, LAYERS) for phase in ("forward", "backward") for name in ROUTED]
        assert sorted(traffic) == sorted(expected), "recomputation sends nothing again"
