"""What a rank holds and sends, read off the graphs, is what the simulated ranks hold and send."""

from __future__ import annotations

from collections import Counter

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


@pytest.mark.parametrize(("zero", "times"), [(0, {"dp": 1, "tp": 3}), (2, {"dp": 2, "tp": 3}), (3, {"dp": 3, "tp": 3})])
def test_microbatches_send_again_what_is_not_of_the_whole_step(zero: int, times: dict[str, int]) -> None:
    """Of two gathers and scatters with zero=2 one is for each microbatch: gathers of parameters are for all."""
    example = named_model("mlp")

    def moved(microbatches: int) -> dict[str, int]:
        plan = Plan(zero=zero, microbatches=microbatches, microbatch_weights="rows", bucket_mb=0, overlap_mb=0)
        found = Counter[str]()
        for one in sent(compile_program(example.model, Mesh(dp=2, tp=2), plan, (), example.batch)):
            found[one.axis] += one.bytes
        return found

    one, three = moved(1), moved(3)
    assert three["tp"] == times["tp"] * one["tp"]
    assert three["dp"] == pytest.approx(times["dp"] * one["dp"], rel=0.01)  # beside gradients: the loss


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
