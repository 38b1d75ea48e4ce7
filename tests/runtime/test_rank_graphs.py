"""What runs of a program is made, and written as Python, when the program is bound: mistakes do not wait for a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import autopar
from autopar import Mesh, Plan
from autopar.cache import compiled as cache_compiled
from autopar.compiler import compile_program
from autopar.errors import InvariantError
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.runtime.rank_graphs import model_graphs
from tests.against_one_process import Tiny, float64, tiny_batch
from tests.launch import run_ranks
from tests.selection import slow_but

# (mesh, plan): what runs at every step, what only under no_sync, and what takes whole parameters
GRAPHS = [
    (Mesh(tp=2), Plan(), set(), set()),
    (Mesh(dp=2), Plan(), {"partial", "reduced"}, set()),
    (Mesh(dp=2), Plan(zero=1), {"partial", "reduced"}, {"forward", "inference"}),
    (Mesh(dp=2), Plan(zero=2), set(), {"forward", "inference"}),
    (Mesh(dp=2), Plan(zero=3), set(), set()),
]


@pytest.mark.parametrize(
    ("mesh", "plan", "rare", "gathered"), slow_but([0, 2, 4], GRAPHS), ids=["tp", "dp", "zero1", "zero2", "zero3"]
)
def test_the_graphs_of_a_model(mesh: Mesh, plan: Plan, rare: set[str], gathered: set[str]) -> None:
    program = compile_program(float64(Tiny), mesh, plan, (), tiny_batch())
    assert isinstance(program, Program)
    graphs = model_graphs(program)
    assert set(graphs.usual) == {"forward", "backward", "inference"}
    assert set(graphs.rare) == rare
    assert set(graphs.gathered) == gathered
    role = program.required_role
    changed = {name for name in graphs.usual if graphs[name] is not role.graphs[name]}
    assert changed == gathered


def nameless(*args: Any) -> Any:
    return args[0]


def with_a_fault(program: AnyProgram, name: str) -> AnyProgram:
    """``program`` whose graph ``name`` calls a function that Python text has no name for, in every stage of it."""
    if isinstance(program, PipelinedProgram):
        return replace(program, stages=tuple(with_a_fault(stage, name) for stage in program.stages))  # type: ignore[misc]
    role = program.required_role.clone()
    *_, last = [node for node in role.graphs[name].nodes if node.op == "call_function"]
    last.target = nameless
    return replace(program, role=role)


def call_with_faults(mesh: Mesh) -> dict[str, str]:
    found = {}
    compiled = cache_compiled.compile_program
    for name in ("forward", "backward", "inference"):
        plan = Plan(microbatches=2 if mesh.is_pipelined else 1, microbatch_weights="statistics")
        parallel = autopar.parallelize(float64(Tiny), mesh, plan)
        cache_compiled.compile_program = lambda *args, name=name: with_a_fault(compiled(*args), name)  # type: ignore[attr-defined]
        with pytest.raises(InvariantError) as caught:
            parallel(**tiny_batch())  # training; backward is not asked for, and inference never
        found[name] = str(caught.value)
    cache_compiled.compile_program = compiled  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("mesh", slow_but([0], [Mesh(dp=2), Mesh(pp=2)]), ids=str)
def test_what_cannot_be_written_as_python_fails_at_the_first_call(mesh: Mesh) -> None:
    for found in run_ranks(call_with_faults, 2, mesh):
        assert len(found) == 3
        for where, message in found.items():
            assert "has no name that another process could find" in message, where
