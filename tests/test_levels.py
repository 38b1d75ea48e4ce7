"""Each contract of each level of the compiler is broken once, by a planted pass: the runner says so and names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import split_program
from autopar.errors import InvariantError
from autopar.ir.graph_pass import Level, Phase, graph_pass, run_phases, steps_of
from autopar.ir.parse import parse
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.levels import DIFFERENTIATED, LEVELS, SCHEDULED, SPLIT, TRACED
from autopar.mesh import Mesh
from autopar.passes import COMPILER
from autopar.plan import Plan
from tests.faults import FAULTS, Fault, get_an_attribute


class Net(nn.Module):
    """A constant, a buffer, two layers, an output beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.up(x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
        logits = self.down(torch.nn.functional.gelu(h)) + self.shift
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


LAST = {"traced": "write_losses_as_sums", "split": "cut_stages", "differentiated": "overlap_collectives"}
MESH, PIPELINE = Mesh(dp=2, tp=2), Mesh(pp=2, tp=2)


@cache
def right(level: Level, mesh: Mesh) -> AnyProgram:
    """A program of which all contracts of ``level`` hold."""
    batch = {"x": torch.randn(8, 8), "labels": torch.arange(8)}
    plan = Plan(check_numerics=False, microbatches=4 if mesh is PIPELINE else 1, overlap_mb=0.0)
    return split_program(Net(), mesh, plan, (), batch, after=LAST.get(level.name, "schedule_microbatches"))


def planted() -> Iterator[object]:
    """Every fault of every contract, at every level that has the contract."""
    for level in LEVELS:
        for mesh, contracts in ((MESH, level.contracts), (PIPELINE, level.of_stages)):
            for contract in contracts:
                for number, (fault, words) in enumerate(FAULTS.get(contract.__name__, ())):
                    name = f"{level.name}-{contract.__name__}-{number}"
                    yield pytest.param(level, mesh, contract.__name__, fault, words, id=name)


def test_every_contract_of_every_level_has_a_planted_fault() -> None:
    contracts = {contract.__name__ for level in LEVELS for contract in (*level.contracts, *level.of_stages)}
    assert contracts == FAULTS.keys() and all(FAULTS.values())
    assert [phase.level for phase in COMPILER] == [TRACED, SPLIT, SPLIT, DIFFERENTIATED, DIFFERENTIATED, SCHEDULED]


@pytest.mark.parametrize(("level", "mesh", "contract", "fault", "words"), planted())
def test_a_planted_fault_is_caught_after_the_pass_that_planted_it(
    level: Level,
    mesh: Mesh,
    contract: str,
    fault: Fault,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOPAR_DUMP_DIR", ".")
    before = right(level, mesh)
    phase = Phase("planted", (graph_pass()(lambda program: program), graph_pass()(fault)), level)
    with pytest.raises(InvariantError) as caught:
        run_phases(before, (phase,))
    said = str(caught.value)
    assert words in said and "\nLikely fix: " in said
    assert said.splitlines()[-1] == f"Contract {contract}, of a {level.name} program, broken by pass {fault.__name__}"
    assert f"autopar replay autopar-failed-{fault.__name__}.txt --pass {fault.__name__}" in caught.value.__notes__[0]


def test_a_fault_in_a_stage_names_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def lose_it_in_the_last(stage: Program) -> Program:
        return replace(stage, role=None) if stage.loss is not None else stage

    phase = Phase("planted", (graph_pass()(lose_it_in_the_last),), DIFFERENTIATED, each_stage=True)
    words = "Contract is_differentiated, of stage 1 of a differentiated program, broken by pass lose_it_in_the_last"
    with pytest.raises(InvariantError, match=words):
        run_phases(right(DIFFERENTIATED, PIPELINE), (phase,))


def test_stages_that_a_pass_leaves_are_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it gives are, and all of them where nobody has checked them."""
    monkeypatch.chdir(tmp_path)
    checked = list[int]()

    def count(stage: Program) -> None:
        checked.append(len(stage.graph.nodes))
        if stage.role is None:
            raise InvariantError("no role\nLikely fix: none")

    def lose_a_role(program: PipelinedProgram) -> PipelinedProgram:
        return replace(program, stages=(program.stages[0], replace(program.stages[1], role=None)))

    level, before = Level("counted", (count,)), right(DIFFERENTIATED, PIPELINE)
    leave = graph_pass(copies=False)(lambda program: program)
    run_phases(before, (Phase("", (leave,), level),), since="<lambda>")
    assert len(checked) == 2
    with pytest.raises(InvariantError, match="Contract count, of stage 1 of a counted program, broken by pass lose"):
        run_phases(before, (Phase("", (leave, graph_pass(copies=False)(lose_a_role)), level),), since="<lambda>")
    assert len(checked) == 2 + 2 + 1


def test_a_fault_of_the_trace_is_one() -> None:
    traced = get_an_attribute(right(TRACED, MESH).clone())
    with pytest.raises(InvariantError, match="Contract is_flat, of a traced program, broken by trace"):
        run_phases(traced, COMPILER)


ORDER = [  # pass -> a program that it comes too late for, or is there already, and the contract that says so
    ("write_losses_as_sums", SPLIT, MESH, "nothing_is_placed"),
    ("synchronise_batch_norm", SPLIT, MESH, "nothing_is_placed"),
    ("draw_dropout", SPLIT, MESH, "nothing_is_placed"),
    ("split_batch", SPLIT, MESH, "nothing_is_placed"),
    ("split_tensors", SPLIT, MESH, "whole_on(tp)"),
    ("cut_stages", SPLIT, PIPELINE, "is_not_cut"),
    ("differentiate", DIFFERENTIATED, MESH, "is_not_differentiated"),
    ("differentiate", DIFFERENTIATED, PIPELINE, "is_not_differentiated"),
    ("schedule_microbatches", SCHEDULED, PIPELINE, "is_not_scheduled"),
]


@pytest.mark.parametrize(("name", "level", "mesh", "contract"), ORDER, ids=[row[0] for row in ORDER])
def test_a_pass_in_the_wrong_order_is_refused(
    name: str, level: Level, mesh: Mesh, contract: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvariantError) as caught:
        run_phases(right(level, mesh), COMPILER, since=name, until=name)
    assert str(caught.value).splitlines()[-1] == f"Contract {contract}, required by pass {name}"


def test_parameters_are_sharded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = replace(right(SPLIT, MESH), plan=Plan(zero=3))
    once = run_phases(split, COMPILER, since="shard_parameters", until="shard_parameters")
    words = r"parameter 'up.weight' is \[.*gathered over 'dp' already(.|\n)*no_parameter_is_gathered, required by pass"
    with pytest.raises(InvariantError, match=words):
        run_phases(once, COMPILER, since="shard_parameters", until="shard_parameters")


def test_microbatches_are_weighed_before_anything_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = replace(right(SPLIT, MESH), plan=Plan(microbatches=2))
    with pytest.raises(InvariantError, match="Contract nothing_is_placed, required by pass weigh_microbatches"):
        run_phases(split, COMPILER, since="weigh_microbatches", until="weigh_microbatches")


def test_rows_are_copied_before_anything_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    placed = parse("program mesh(dp=2 tp=2)\n  x = input : f32[3,8@tp]\n  y = aten.relu(x) : f32[3,8@tp]\n  return y")
    with pytest.raises(InvariantError, match="Contract nothing_is_placed, required by pass pad_rows"):
        run_phases(placed, COMPILER, since="pad_rows", until="pad_rows")


@pytest.mark.parametrize("axis", ["sp", "tp"])
def test_a_sequence_is_split_once_and_before_tensors(
    axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    placed = parse(
        f"program mesh(sp=2 tp=2)\n  x = input : f32[4,8@{axis}]\n  y = aten.relu(x) : f32[4,8@{axis}]\n  return y"
    )
    with pytest.raises(InvariantError, match=rf"Contract whole_on\({axis}\), required by pass split_sequence"):
        run_phases(placed, COMPILER, since="split_sequence", until="split_sequence")


def test_every_requirement_of_a_pass_is_seen_to_refuse() -> None:
    required = {(step.name, contract.__name__) for _, step in steps_of(COMPILER) for contract in step.requires}
    seen = {(name, contract) for name, _, _, contract in ORDER}
    assert required - seen == {
        ("shard_parameters", "no_parameter_is_gathered"),  # seen above
        *((name, "nothing_is_placed") for name in ("weigh_microbatches", "pad_rows")),  # seen above
        *(("split_sequence", f"whole_on({axis})") for axis in ("sp", "tp")),  # seen above
    }
