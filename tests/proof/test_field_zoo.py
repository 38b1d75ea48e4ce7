"""Every architecture of the zoo, on meshes of every kind, is proved in the field: nothing that is right is refused."""

from __future__ import annotations

from typing import Any

import pytest

from autopar import zoo
from autopar.check import Reference
from autopar.errors import AutoparError
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.proof.field_proof import prove_in_field
from autopar.zoo.named import OURS, named_model
from tests.selection import slow_but

CASES: dict[str, tuple[Mesh, dict[str, Any]]] = {
    "dp=2": (Mesh(dp=2), {}),
    "tp=2": (Mesh(tp=2), {}),
    "dp=2,tp=2": (Mesh(dp=2, tp=2), {}),
    "sp=2": (Mesh(sp=2), {}),
    "ep=2": (Mesh(ep=2), {}),
    "zero=3": (Mesh(dp=2), {"zero": 3}),
    "megatron": (Mesh(tp=2), {"sequence": "megatron"}),
    "pp=2": (Mesh(pp=2), {"microbatches": 2}),
    "recompute": (Mesh(dp=2), {"recompute": "full"}),
}
NAMES = [*(f"hf:{name}" for name in zoo.ARCHITECTURES), *(f"models.{name}" for name in OURS)]


@pytest.mark.parametrize("name", slow_but((), NAMES))
def test_right_programs_are_not_refused(name: str) -> None:
    example = named_model(name, batch=4)
    reference = Reference(example.model, example.batch)
    given: dict[str, Any] = {"source": reference.traced, "tensors": reference.state, "kwargs": reference.batch}
    refused = {}
    for case, (mesh, choices) in CASES.items():
        try:
            program = reference.program(mesh, Plan(**choices))
        except AutoparError:  # there is no such program
            continue
        found = prove_in_field(program, **given)
        if not found.holds:
            refused[case] = found
    assert not refused
