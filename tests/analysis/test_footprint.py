"""What a rank holds and sends, read off the graphs, is what the simulated ranks hold and send."""

from __future__ import annotations

import pytest

from autopar.analysis.footprint import held, sent
from autopar.compiler import compile_program, split_program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.zoo.named import named_model


@pytest.mark.parametrize(
    "mesh, sequence", [("dp=2", "none"), *((mesh, s) for mesh in ("tp=2", "dp=2,tp=3") for s in ("none", "megatron"))]
)
def test_traffic_is_that_of_a_step(mesh: str, sequence: str) -> None:
    example = named_model("llama")
    program = compile_program(example.model, Mesh.parse(mesh), Plan(sequence=sequence), (), example.batch)
    step = simulate(program, example.model.state_dict(), (), example.batch)
    assert sorted(map(str, sent(program))) == sorted(map(str, step.traffic))


def test_before_differentiation_only_forward_is_known() -> None:
    example = named_model("mlp")
    program = split_program(example.model, Mesh(dp=2, tp=2), None, (), example.batch)
    assert {transfer.phase for transfer in sent(program)} == {"forward"}


def test_parameters() -> None:
    example = named_model("mlp")
    program = split_program(example.model, Mesh(dp=2, tp=2), None, (), example.batch)
    whole = sum(parameter.numel() * 4 for parameter in example.model.parameters())
    biases = sum(example.model.get_parameter(f"blocks.{i}.down.bias").numel() * 4 for i in (0, 1))
    found = held(program)
    assert found.whole == whole
    assert found.split == {"dp": 0, "tp": whole - biases}
    assert found.rank == (whole - biases) // 2 + biases
