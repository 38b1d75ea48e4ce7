"""Every pair of axes, every triple with pipelines, all five at once: a mixture of experts, exact in float64."""

from __future__ import annotations

import itertools
import warnings
from functools import cache
from typing import Any

import pytest

from autopar.check import TOLERANCE, Reference
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.schedules.named import NAMES
from autopar.zoo.named import named_model
from tests.selection import slow_but

pytest.importorskip("transformers")

AXES = ("pp", "dp", "ep", "sp", "tp")
CASES: dict[str, dict[str, Any]] = {
    "pp=2,dp=2": {"schedule": "gpipe", "microbatches": 3, "zero": 1},
    "pp=2,ep=2": {"schedule": "1f1b", "microbatches": 2, "zero": 2},
    "pp=2,sp=2": {"schedule": "interleaved", "microbatches": 2, "attention": "ring"},
    "pp=2,tp=2": {"schedule": "zb-h1", "microbatches": 3, "sequence": "megatron"},
    "dp=2,ep=2": {"zero": 3},
    "dp=2,sp=2": {"zero": 2, "attention": "ulysses"},
    "dp=2,tp=2": {"zero": 3, "sequence": "megatron"},
    "ep=2,sp=2": {"zero": 1, "attention": "gather"},
    "ep=2,tp=2": {"zero": 3, "expert_axes": "ep"},
    "sp=2,tp=2": {"attention": "ring"},
    "dp_replicate=2,dp_shard=2,tp=2": {"zero": 3, "reshard_after_forward": False},
    "pp=2,dp=2,ep=2": {"schedule": "zb-v", "microbatches": 3, "zero": 1},
    "pp=2,dp=2,sp=2": {"schedule": "dualpipe-v", "microbatches": 3, "zero": 2},
    "pp=2,dp=2,tp=2": {"schedule": "1f1b", "microbatches": 2, "zero": 3, "recompute": "selective"},
    "pp=2,ep=2,sp=2": {"schedule": "gpipe", "microbatches": 2, "zero": 3},
    "pp=2,ep=2,tp=2": {"schedule": "1f1b", "microbatches": 3, "expert_axes": "ep+tp"},
    "pp=2,sp=2,tp=2": {"schedule": "interleaved", "microbatches": 2, "zero": 1, "sequence": "megatron"},
    "pp=2,dp_replicate=2,dp_shard=2": {"microbatches": 2, "zero": 3},
    "pp=2,dp=2,ep=2,sp=2,tp=2": {"microbatches": 2, "zero": 2, "recompute": "full"},  # 32 ranks
}
QUADRUPLES = [",".join(f"{axis}=2" for axis in chosen) for chosen in itertools.combinations(AXES, 4)]


@cache
def reference(layers: int) -> Reference:
    """Labels that are ignored unequally often by row."""
    example = named_model("hf:mixtral", {"num_hidden_layers": layers}, batch=24)
    return Reference(example.model, example.batch)


def exact(mesh: str, choices: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*microbatch.*")  # bubbles: these are short
        layers = 2 if Mesh.parse(mesh).world_size > 16 else 4  # for stages of one
        report = reference(layers).check(Mesh.parse(mesh), Plan(**choices, check_numerics=False))
    assert report.grads and report.worst <= TOLERANCE, report


FAST = [number for number, mesh in enumerate(CASES) if mesh.count(",") > 2]


@pytest.mark.parametrize("mesh", slow_but(FAST, list(CASES)))
def test_equals_the_model(mesh: str) -> None:
    exact(mesh, CASES[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("mesh", [*CASES, *QUADRUPLES])
def test_equals_the_model_with_every_zero_stage(mesh: str, zero: int) -> None:
    exact(mesh, CASES.get(mesh, {"microbatches": 2 if "pp" in mesh else 1}) | {"zero": zero})


def test_the_cases_cover_what_they_should() -> None:
    """Pairs, triples with ``pp``, all five, each ZeRO stage and each schedule: a case that is taken away is missed."""
    found = {frozenset(name for name, size in Mesh.parse(mesh).axes if size > 1) for mesh in CASES}
    pairs = set(map(frozenset, itertools.combinations(AXES, 2)))
    triples = {frozenset(("pp", *rest)) for rest in itertools.combinations(AXES[1:], 2)}
    assert pairs | triples | {frozenset(AXES)} <= found
    assert {choices.get("zero", 0) for choices in CASES.values()} == {0, 1, 2, 3}
    assert {choices.get("schedule", "1f1b") for choices in CASES.values()} == {*NAMES} - {"inference"}
