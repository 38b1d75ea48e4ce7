"""A schedule that the user has written down, through ``Plan``."""

from __future__ import annotations

import pytest
import torch

from autopar.check import Reference
from autopar.errors import ScheduleError
from autopar.mesh import Mesh
from autopar.models import mlp
from autopar.plan import Plan

# each rank holds two stages, gradients of weights come last
WRITTEN = """
rank 0: F0.0 F2.0 F0.1 F2.1 B2.0 I0.0 B2.1 I0.1 W0.0 W0.1
rank 1: F1.0 F3.0 B3.0 F1.1 I1.0 F3.1 B3.1 I1.1 W1.0 W1.1
"""


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(0)
    model = mlp.build()
    return Reference(model, mlp.example_batch(model, 6))


def test_it_runs_and_gives_the_model_s_numbers(reference: Reference) -> None:
    report = reference.check(Mesh(pp=2), Plan(schedule=WRITTEN, microbatches=2))
    assert report.passed, report.worst
    assert report.program.schedule is not None and report.program.schedule.placement == (0, 1, 0, 1)


def test_a_missing_weight_gradient_is_refused(reference: Reference) -> None:
    with pytest.raises(ScheduleError, match=r"W1\.1"):
        reference.check(Mesh(pp=2), Plan(schedule=WRITTEN.replace(" W1.1", ""), microbatches=2))


def test_other_numbers_than_the_plan_s_are_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="2 pipeline ranks and 2 microbatches"):
        reference.check(Mesh(pp=2), Plan(schedule=WRITTEN, microbatches=3))
