"""Pipelines on real gloo processes for hundreds of steps: every loss, and the parameters at the end, are one device's.

``pytest -m slow tests/pipeline/test_many_steps.py``: schedules x stages x data axes x ZeRO, with more and with fewer
microbatches than stages, batches whose rows do not divide, several lengths, and recomputation.
"""

from __future__ import annotations

from typing import Any

import pytest

from autopar import Mesh
from tests.launch import run_ranks
from tests.pipeline.many_steps import train

STEPS = 300
TOLERANCE = 1e-9  # after hundreds of steps in float64, each of which starts from the rounding of those before

Run = tuple[str, str, dict[str, Any], int, int, bool, str]


def runs() -> list[Run]:
    """(model, mesh, plan, rows, rows of a tail batch, several lengths, optimizer)."""
    found: list[Run] = []
    for schedule in ("zb-v", "dualpipe-v", "interleaved", "1f1b"):
        found += [
            ("llama", "pp=2", {"schedule": schedule, "microbatches": 8}, 8, 8, False, "AdamW"),
            ("gpt", "pp=2,dp=2", {"schedule": schedule, "microbatches": 1, "zero": 2}, 6, 4, False, "SGD"),
            ("gpt", "pp=4", {"schedule": schedule, "microbatches": 2}, 6, 3, False, "SGD"),
            ("llama", "pp=4", {"schedule": schedule, "microbatches": 6, "recompute": "full"}, 12, 10, False, "AdamW"),
            ("llama", "pp=2,dp=2", {"schedule": schedule, "microbatches": 5, "zero": 1}, 14, 12, False, "AdamW"),
        ]
    found += [
        ("gpt", "pp=2", {"schedule": "zb-v", "microbatches": 3, "recompute": "full"}, 7, 5, True, "SGD"),
        ("gpt", "pp=4,dp=2", {"schedule": "zb-v", "microbatches": 4, "zero": 2}, 16, 8, False, "SGD"),
        ("llama", "pp=4,dp=2", {"schedule": "dualpipe-v", "microbatches": 3, "zero": 1}, 12, 6, False, "AdamW"),
        ("llama", "pp=2,dp=2", {"schedule": "dualpipe-v", "microbatches": 4, "zero": 3}, 16, 12, False, "SGD"),
        ("llama", "pp=2,tp=2", {"schedule": "zb-v", "microbatches": 4, "recompute": "selective"}, 8, 6, True, "SGD"),
    ]
    return found


def name(run: Run) -> str:
    model, mesh, plan, rows, tail, lengths, optimizer = run
    said = [f"{key}:{choice}" for key, choice in plan.items()]
    return " ".join([model, mesh.replace("=", ":"), *said, f"{rows}/{tail}", *["lengths"] * lengths, optimizer])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", [pytest.param(run, id=name(run)) for run in runs()])
def test_hundreds_of_steps(run: Run) -> None:
    errors = run_ranks(train, Mesh.parse(run[1]).world_size, *run, STEPS, timeout=800)[0]
    print(f"{name(run)}: {STEPS} steps, worst loss {errors['loss']:.1e}, parameters {errors['parameters']:.1e}")
    assert max(errors.values()) <= TOLERANCE
