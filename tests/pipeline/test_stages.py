"""A hand-written program cut into stages, its backward pass in steps, its text form and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.autodiff.halves import backward_steps
from autopar.compiler import finish_program
from autopar.errors import InvariantError, ProgramFileError
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import Mesh
from autopar.pipeline.stages import Assignment, Crossing, crossings, first_ranks, stage_programs, users_of
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import Step

# `first` goes past stage 1; `ids` is an integer made by stage 0; `table` is used by stages 0 and 2
TEXT = """
program mesh(pp=3)
  table  = param table                    : f64[7,4]
  w      = param w                        : f64[4,4]
  x      = input                          : i64[6]
  ids    = aten.remainder.Scalar(x, 7)    : i64[6]
  first  = aten.embedding(table, ids)     : f64[6,4]
  h      = aten.linear(first, w)          : f64[6,4]
  g      = aten.gelu(h)                   : f64[6,4]
  both   = aten.add.Tensor(g, first)      : f64[6,4]
  logits = aten.linear(both, table)       : f64[6,7]
  column = aten.unsqueeze(ids, 1)         : i64[6,1]
  picked = aten.gather(logits, 1, column) : f64[6,1]
  loss   = aten.mean(picked)              : f64[]
  return loss=loss
"""
STAGES = {"ids": 0, "first": 0, "h": 1, "g": 1, "both": 2, "logits": 2, "column": 2, "picked": 2, "loss": 2}


def cut(schedule: str = "1f1b", text: str = TEXT, constants: Mapping[str, Tensor] | None = None) -> PipelinedProgram:
    plan = Plan(microbatches=2, schedule=schedule, batch_dims={"x": 0})
    program = parse(text, plan, constants)
    names = {node.name: node for node in program.graph.nodes}
    assignment = Assignment({names[name]: stage for name, stage in STAGES.items()}, frozenset())
    found = finish_program(program.cut_into(stage_programs(program, assignment, 3)))
    assert isinstance(found, PipelinedProgram)
    return found


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in (("table", (7, 4)), ("w", (4, 4)))}


def test_values_go_straight_to_their_users() -> None:
    program = cut()
    found = list(crossings(program))
    assert Crossing(0, 1, ("first",), ("first",)) in found
    assert Crossing(0, 2, ("ids", "first"), ("first",)) in found, "integers cross, and have no gradient"
    assert Crossing(1, 2, ("g",), ("g",)) in found
    assert len(found) == 3


def test_a_parameter_of_two_stages_is_of_both() -> None:
    program = cut()
    assert users_of(program) == {"table": (0, 2), "w": (1,)}
    assert first_ranks(program) == {"table": 0, "w": 1}


def test_each_stage_is_a_program() -> None:
    middle = cut().stages[1]
    assert [(entry.kind, entry.target) for entry in middle.inputs] == [
        (InputKind.PARAMETER, "w"),
        (InputKind.RECEIVED, "0.first"),
    ]
    assert [(entry.kind, entry.target) for entry in middle.outputs] == [(OutputKind.SENT, "2.g")]
    assert middle.mesh == Mesh() and middle.required_role.grads == ("w", "0.first")


def reference(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: tensor.requires_grad_() for name, tensor in state().items()}
    ids = x % 7
    first = leaves["table"][ids]
    both = torch.nn.functional.gelu(first @ leaves["w"].t()) + first
    loss = (both @ leaves["table"].t()).gather(1, ids.unsqueeze(1)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_stages_make_what_the_whole_makes(schedule: str) -> None:
    x = torch.arange(12)
    step: Step = simulate(cut(schedule), state(), (), {"x": x})
    loss, grads = reference(x)
    assert step.loss is not None and float((step.loss - loss).abs().detach()) < 1e-14
    for name, grad in grads.items():
        assert float((step.grads[name] - grad).abs().max()) < 1e-14, name


def test_input_and_weight_gradients_are_the_backward_pass_in_two_halves() -> None:
    stage = cut().stages[1]
    steps = backward_steps(stage)
    assert steps is not None and steps.at_once == ("0.first",) and steps.later == ("w",)
    products = [sum("mm" in str(node.target) for node in graph.nodes) for graph in (steps.inputs, steps.weights)]
    assert products == [1, 1], "one product for the gradient of the input, one for that of the weight"
    generator = torch.Generator().manual_seed(1)
    given: list[Any] = [
        [torch.randn(value(node).shape, generator=generator, dtype=torch.float64)]
        for node in steps.whole.nodes
        if node.op == "placeholder"
    ]
    whole = Lockstep(stage.mesh).run(steps.whole, list(given))
    grad, *kept = Lockstep(stage.mesh).run(steps.inputs, list(given))
    (weight,) = Lockstep(stage.mesh).run(steps.weights, kept)
    assert torch.equal(grad[0], whole[0][0]) and torch.equal(weight[0], whole[1][0])


def test_the_text_form_reads_back() -> None:
    program = cut("zb-h1")
    text = str(program)
    again = parse(text, program.plan)
    assert str(again) == text and len(again.stages) == 3 and again.schedule == program.schedule
    x = torch.arange(12)
    one, other = (simulate(each, state(), (), {"x": x}) for each in (program, again))
    assert all(torch.equal(one.grads[name], other.grads[name]) for name in one.grads)


def test_files_read_back(tmp_path: Path) -> None:
    program = cut()
    program.save(tmp_path / "out")
    assert str(Program.load(tmp_path / "out")) == str(program)
    ranks = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["ranks"]
    assert [row["stages"] for row in ranks] == [[0], [1], [2]]


def test_the_tail_reads_back_also_by_its_older_name(tmp_path: Path) -> None:
    """Older files call the tail ``remainder``, in the names of its constants too."""
    program, last = (scaled(factor) for factor in (1.0, 2.0))
    program = replace(program, tail=last)
    program.save(tmp_path / "out")
    again = Program.load(tmp_path / "out")
    assert isinstance(again, PipelinedProgram) and again.tail is not None and str(again) == str(program)
    older = str(program).replace("\ntail mesh", "\nremainder mesh")
    assert older != str(program)
    constants = {"c": torch.tensor(1.0).double(), "remainder/c": torch.tensor(2.0).double()}
    read = parse(older, program.plan, constants)
    assert isinstance(read, PipelinedProgram) and read.tail is not None and str(read) == str(program)
    for found in (again, read):
        assert found.tail is not None
        assert [float(one.constants["c"]) for one in (found, found.tail)] == [1.0, 2.0]
        assert [float(one.stages[1].constants["c"]) for one in (found, found.tail)] == [1.0, 2.0]
    with pytest.raises(ProgramFileError, match="expected stages of the tail"):
        parse(str(program.whole) + "\n\ntail mesh(pp=3)\n  return\n")


def scaled(factor: float) -> PipelinedProgram:
    """The program in which stage 1 multiplies by a constant ``c``."""
    text = TEXT.replace("  x      = input", "  c      = const c                        : f64[]\n  x      = input")
    text = text.replace("aten.gelu(h)                   : f64[6,4]", "aten.mul.Tensor(h, c)          : f64[6,4]")
    return cut(text=text, constants={"c": torch.tensor(factor).double()})


def test_the_whole_is_what_was_cut() -> None:
    traced = parse(TEXT)
    program = traced.cut_into(tuple(replace(stage, role=None) for stage in cut().stages))
    assert isinstance(program, PipelinedProgram) and program.whole == traced
    assert list(program.stages_on(0)) == [], "nobody runs anything before there is a schedule"
    done = finish_program(program)
    assert isinstance(done, PipelinedProgram)
    assert [list(done.stages_on(place)) for place in range(3)] == [[0], [1], [2]]


def test_what_is_not_finished_says_so() -> None:
    program = parse(TEXT)
    with pytest.raises(InvariantError, match="no role: it is not differentiated\nWay out"):
        simulate(program, state(), (), {"x": torch.arange(6)})
    with pytest.raises(InvariantError, match="no schedule: it was not finished\nWay out"):
        simulate(program.cut_into(cut().stages), state(), (), {"x": torch.arange(12)})


def test_a_damaged_schedule_names_its_line() -> None:
    text = str(cut()).replace("rank 1: RECV F0.0", "rank 1: RECV X0.0")
    number = next(n for n, line in enumerate(text.splitlines(), 1) if "X0.0" in line)
    with pytest.raises(ProgramFileError, match=f"line {number}"):
        parse(text)


def test_what_a_rank_runs_can_be_read() -> None:
    rank = cut().rank(1)
    assert "# stage 1" in rank.code and "def backward" in rank.code
    assert rank.instructions.splitlines()[:3] == ["RECV F0.0 -> 1", "RECV F0.1 -> 1", "F1.0"]
