"""Pipelines on simulated ranks against the unmodified model in float64: loss, outputs and every gradient.

One ``Reference`` serves all rows of a model: it keeps its traces. Batches of 19 rows are uneven for almost any number
of microbatches.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import pytest
import torch

from autopar.check import Reference, Report
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests import hugging_face

ROWS = 19
OURS = ("llama", "gpt", "t5", "vit", "mlp", "moe")
MODELS = (*OURS, "hf:llama", "hf:gpt2")
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved-1": {"schedule": "interleaved", "virtual_stages": 1},
    "interleaved-2": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-h1": {"schedule": "zb-h1"},
    "zb-v": {"schedule": "zb-v"},
    "dualpipe-v": {"schedule": "dualpipe-v"},
}


@lru_cache(maxsize=2)
def reference(name: str, rows: int = ROWS) -> Reference:
    torch.manual_seed(0)
    if name.startswith("hf:"):
        model, few = hugging_face.build(name[3:])
        times = -(-rows // hugging_face.BATCH)
        batch = {key: torch.cat([tensor] * times)[:rows] for key, tensor in few.items()}
        generator = torch.Generator().manual_seed(1)
        batch["input_ids"] = torch.randint(3, hugging_face.VOCABULARY, batch["input_ids"].shape, generator=generator)
        batch["labels"] = batch["input_ids"].where(batch["labels"] != -100, -100)
    else:
        module = importlib.import_module(f"models.{name}")
        model = module.build()
        batch = module.example_batch(model, rows)
    return Reference(model, batch)


def passed(report: Report) -> bool:
    assert report.step.loss is not None and report.program.stages
    return report.passed


COVERING = [  # every model, every schedule, every p, every kind of m
    ("llama", "1f1b", 2, 2), ("llama", "zb-v", 2, 5), ("llama", "interleaved-2", 2, 4), ("llama", "gpipe", 1, 3),
    ("gpt", "gpipe", 2, 5), ("gpt", "zb-h1", 4, 4), ("gpt", "dualpipe-v", 3, 6),
    ("t5", "interleaved-1", 3, 7), ("t5", "dualpipe-v", 2, 4), ("t5", "1f1b", 4, 8),
    ("vit", "zb-h1", 3, 3), ("vit", "zb-v", 4, 9), ("mlp", "interleaved-2", 4, 9), ("mlp", "dualpipe-v", 1, 2),
    ("moe", "1f1b", 3, 6), ("moe", "zb-v", 1, 3), ("hf:llama", "zb-h1", 2, 5), ("hf:gpt2", "interleaved-2", 2, 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "schedule", "p", "m"), COVERING)
def test_the_unmodified_model(name: str, schedule: str, p: int, m: int) -> None:
    report = reference(name).check(Mesh(pp=p), Plan(microbatches=m, **SCHEDULES[schedule]))
    assert passed(report), report.worst
    assert sum(stage.loss is not None for stage in report.program.stages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_and_size(name: str, schedule: str, record_property: Any) -> None:
    errors = {}
    for p in (1, 2, 3, 4):
        for m in (p, 2 * p, 2 * p + 1):
            report = reference(name).check(Mesh(pp=p), Plan(microbatches=m, **SCHEDULES[schedule]))
            errors[p, m] = report.worst
            assert passed(report), (p, m, report.worst)
    record_property("worst", max(errors.values()))
