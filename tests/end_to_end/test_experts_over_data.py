"""Mixtures of experts whose batch is split over ``ep``, with every other axis and ZeRO stage: each number is exact."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.check import TOLERANCE, Reference
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.named import named_model

pytest.importorskip("transformers")

ROWS = 12
MESHES = ("ep=1", "ep=2", "ep=3", "dp=2,ep=2", "dp=2,ep=3", "ep=2,sp=2", "ep=2,tp=2", "pp=2,ep=2")


@cache
def reference(name: str) -> Reference:
    example = named_model(f"hf:{name}", {"num_hidden_layers": 2}, batch=ROWS)
    return Reference(example.model, example.batch)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_the_model(mesh: str, zero: int) -> None:
    on = Mesh.parse(mesh)
    plan = Plan(zero=zero, microbatches=2 if on.is_pipelined else 1, check_numerics=False)
    report = reference("mixtral").check(on, plan)
    assert report.worst <= TOLERANCE, report
