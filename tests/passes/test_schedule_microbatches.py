"""Instructions of pipeline ranks: of the plan's schedule, with messages, checked, and a warning of idle ranks."""

from __future__ import annotations

import warnings

import pytest

from autopar.autodiff.differentiate import differentiate
from autopar.errors import ScheduleError
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.passes.cut_stages import cut_stages
from autopar.passes.schedule_microbatches import schedule_microbatches
from autopar.plan import Plan
from autopar.schedules.instructions import Kind
from autopar.schedules.text import format_schedule

TEXT = """
program mesh(pp=2)
  x    = input               : f32[6,8] nograd
  u    = param u             : f32[8,8]
  w    = param w             : f32[8,8]
  h    = aten.linear(x, u)   : f32[6,8]
  y    = aten.linear(h, w)   : f32[6,8]
  loss = aten.sum(y)         : f32[]
  return loss
"""


def scheduled(plan: Plan) -> Program:
    return schedule_microbatches(differentiate(cut_stages(parse(TEXT, plan))))


def computes(program: Program, rank: int) -> list[tuple[Kind, int, int]]:
    assert program.schedule is not None
    return [(step.kind, step.stage, step.microbatch) for step in program.schedule.computes(rank)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_every_stage_runs_forward_and_backward_on_every_microbatch(name: str) -> None:
    program = scheduled(Plan(schedule=name, microbatches=3))
    for rank in range(2):
        wanted = {(kind, rank, microbatch) for kind in (Kind.F, Kind.B) for microbatch in range(3)}
        found = computes(program, rank)
        assert len(found) == 6 and set(found) == wanted
    kinds = [kind for kind, _, _ in computes(program, 1)]
    assert kinds == ([Kind.F] * 3 + [Kind.B] * 3 if name == "gpipe" else [Kind.F, Kind.B] * 3)


def test_what_stages_send_each_other_is_in_it() -> None:
    program = scheduled(Plan(microbatches=2))
    assert program.schedule is not None and program.schedule.has_messages
    text = format_schedule(program.schedule)
    assert all(f"SEND {kind}.{m} -> {to}" in text for kind, to in (("F0", 1), ("B1", 0)) for m in (0, 1))


def test_fewer_microbatches_than_ranks_leave_ranks_idle() -> None:
    with pytest.warns(UserWarning, match=r"1 microbatch for 2 pipeline ranks: .* bubble of 100%"):
        scheduled(Plan(microbatches=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled(Plan(microbatches=2))


def test_a_schedule_that_cannot_run_is_refused_before_anything_runs() -> None:
    order = "schedule mine microbatches=1 placement=0,1\nrank 0: F0.0 B0.0\nrank 1: B1.0 F1.0\n"
    with pytest.raises(ScheduleError, match="B1.0"):
        scheduled(Plan(schedule=order, microbatches=1))


def test_a_program_without_stages_has_no_schedule() -> None:
    program = parse(TEXT.replace("pp=2", "dp=2"))
    after = schedule_microbatches(program)
    assert isinstance(after, Program) and str(after) == str(program)
