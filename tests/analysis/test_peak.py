"""The bytes that are counted on tensors without memory are those of the simulated ranks, to the byte."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from autopar.analysis.peak import Peak, peak
from autopar.compiler import compile_program
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.models import llama
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.zoo.named import named_model
from tests.selection import slow_but

CASES: dict[str, dict[str, Any]] = {
    "": {},
    "dp=2": {},
    "dp=2,tp=2": {"zero": 3},
    "tp=2": {"sequence": "megatron"},
    "sp=2": {"attention": "ring"},
    "sp=4": {"attention": "hybrid", "recompute": "full"},
}


def compiled(mesh: str, model: str = "llama", **choices: Any) -> tuple[Program, Any]:
    example = named_model(model, {}, ways=Mesh.parse(mesh).world_size)
    program = compile_program(example.model, Mesh.parse(mesh), Plan(**choices), (), example.batch)
    assert isinstance(program, Program)
    return program, example


@pytest.mark.parametrize("mesh", slow_but([2, 5], CASES))
def test_peak_is_that_of_the_simulated_ranks(mesh: str) -> None:
    program, example = compiled(mesh, **CASES[mesh])
    step = simulate(program, example.model.state_dict(), (), example.batch)
    assert {peak(program).total} == set(step.peak_bytes)


def activations(ways: int, form: str) -> dict[str, int]:
    """Bytes of all ranks together, of a sequence far longer than the model is wide."""
    found = _peak(ways, form)
    return {"forward": ways * found.forward, "backward": ways * found.backward}


@cache
def _peak(ways: int, form: str) -> Peak:
    model = llama.build("tiny", vocab=64, width=64, layers=2, heads=8, kv_heads=4, ff=128)
    tokens = torch.zeros(1, 1024, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    program = compile_program(model, Mesh(sp=ways), Plan(attention=form), (), batch)  # type: ignore[arg-type]
    assert isinstance(program, Program)
    return peak(program)


def test_a_ring_divides_all_activations_by_its_ranks() -> None:
    one = activations(1, "ring")
    for ways in (2, 4):
        found = activations(ways, "ring")
        found["forward"] -= 1024 * 64 * 4  # the logits that are returned, in plain order beside those in zig-zag order
        for phase, size in found.items():
            assert size == pytest.approx(one[phase], rel=0.02), (ways, phase, found, one)


def test_gathered_keys_are_whole_on_each_rank() -> None:
    layers, keys_and_values = 2, 2 * 1024 * 4 * 8 * 4  # bytes: tokens, heads, their width
    more = activations(4, "gather")["forward"] - activations(4, "ring")["forward"]
    assert more == pytest.approx((4 - 1) * layers * keys_and_values, rel=0.05)


def test_what_forward_keeps_is_held_while_backward_begins() -> None:
    program, _ = compiled("sp=2", attention="ring")
    found = peak(program)
    assert 0 < found.kept < found.forward and found.kept < found.backward
    assert found.total == found.resident + max(found.forward, found.backward)


def test_without_gradients_there_is_no_backward() -> None:
    program, _ = compiled("sp=2", attention="ring")
    role = program.required_role
    found = peak(replace(program, role=replace(role, backward=None)))
    assert found.backward == 0 and found.activations == found.forward == peak(program).forward
