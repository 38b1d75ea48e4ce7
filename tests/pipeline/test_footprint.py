"""What a rank of a pipeline holds and sends, read off the graphs, against what a simulated step counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar.analysis.footprint import held, sent
from autopar.mesh import Mesh
from autopar.models import gpt
from autopar.plan import Plan
from autopar.verification.coverage import Case, cover, operations
from tests.pipeline.test_simulated import reference


def most(program: Any) -> dict[tuple[str, str, str], tuple[int, int]]:
    """For each kind the most that any rank sends."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for rank in range(program.mesh.world_size):
        for one in sent(program, rank):
            before = found.get((one.phase, one.axis, one.name), (0, 0))
            found[one.phase, one.axis, one.name] = max(before[0], one.operations), max(before[1], one.bytes)
    return found


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [("pp=2", {"schedule": "zb-v"}), ("pp=2,dp=2", {"zero": 1}), ("pp=3,tp=2", {}), ("pp=2,dp=2", {"zero": 3})],
)
def test_sent(mesh: str, plan: dict[str, Any]) -> None:
    report = reference("gpt", 8).check(Mesh.parse(mesh), Plan(microbatches=4, **plan))
    counted = {(one.phase, one.axis, one.name): (one.operations, one.bytes) for one in report.step.traffic}
    assert most(report.program) == counted


def test_held() -> None:
    program = reference("gpt", 8).program(Mesh(pp=2, tp=2), Plan(microbatches=4))
    whole = held(reference("gpt", 8).program(Mesh(tp=2)))
    found = held(program)
    assert found.whole == whole.whole and found.split["tp"] == whole.split["tp"]
    assert whole.rank / 2 <= found.rank < whole.rank
    assert 0 < found.split["pp"] < found.whole  # the embedding is the head too


def test_operations_of_the_slowest_stage() -> None:
    single = operations(reference("gpt", 8).program(Mesh()))
    stages = operations(reference("gpt", 8).program(Mesh(pp=2), Plan(microbatches=4)))
    assert single / 2 <= stages < 0.7 * single


def test_coverage() -> None:
    torch.manual_seed(0)
    model = gpt.build()
    cases = [Case("pp=2,dp=2", Mesh(pp=2, dp=2), Plan(microbatches=2))]
    (outcome,) = cover("gpt", "ours", model, gpt.example_batch(model, 8), cases).outcomes
    assert outcome.passed, outcome
    assert outcome.compute["pp"] == 1.0 and outcome.parameters["pp"] > 0.5
    assert 0.7 < outcome.efficiency <= 1.0
