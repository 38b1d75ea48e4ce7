"""The text of single ranks in place of what is emitted for them, on pipelines too: functions, and schedules."""

from __future__ import annotations

import pytest

from autopar.errors import ProofError
from autopar.ir.program import PipelinedProgram
from autopar.proof.rank_texts import read_text, text_of
from autopar.proof.structure import structure
from tests.proof.mutated_programs import CASES, right
from tests.selection import slow_but

CHEAP = ("pipeline", "net", "zero 2")
RANK = 3  # of the second stage, and of the second place on tp


def pipeline() -> PipelinedProgram:
    program = right("pipeline")
    assert isinstance(program, PipelinedProgram)
    return program


@pytest.mark.parametrize("case", slow_but([place for place, case in enumerate(CASES) if case in CHEAP], list(CASES)))
def test_the_text_of_every_rank_is_its_code(case: str) -> None:
    program = right(case)
    found = structure(program, {rank: text_of(program, rank) for rank in range(program.mesh.world_size)})
    assert not found.refusals and not found.unproved


def moved(text: str, line: str, before: str) -> str:
    """``line`` in front of the first line ``before``."""
    lines = text.splitlines()
    lines.remove(line)
    lines.insert(lines.index(before), line)
    return "\n".join(lines)


def test_a_schedule_that_other_ranks_of_its_place_do_not_have() -> None:
    """Forward of microbatch 1 before backward of microbatch 0, on one of two ranks that sum over tp in both."""
    text = moved(moved(text_of(pipeline(), RANK), "# F1.1", "# B1.0"), "# RECV F0.2 -> 1", "# B1.0")
    (refusal,) = structure(pipeline(), {RANK: text}).refusals
    assert refusal.ranks == (2, 3) and "and not the same value" in refusal.problem, refusal
    both = {rank: moved(text_of(pipeline(), rank), "# F1.1", "# B1.0") for rank in (2, RANK)}
    assert not structure(pipeline(), both).refusals  # all ranks of the stage do it: another right schedule


def test_a_schedule_that_hangs_is_refused_with_the_circle() -> None:
    texts = {rank: moved(text_of(pipeline(), rank), "# B0.0", "# F0.1") for rank in (0, 1)}
    texts |= {rank: moved(text_of(pipeline(), rank), "# F1.1", "# B1.0") for rank in (2, RANK)}
    (refusal, *_) = structure(pipeline(), texts).refusals
    assert "wait for each other for ever" in refusal.problem and "B0.0" in refusal.problem, refusal


def test_a_send_that_is_left_out() -> None:
    text = text_of(pipeline(), RANK).replace("# SEND B1.2 -> 0\n", "")
    (refusal,) = structure(pipeline(), {RANK: text}).refusals
    assert "B1.2 -> 0" in refusal.problem, refusal


@pytest.mark.parametrize("function", ["forward", "backward_whole"])
def test_another_operation_on_one_rank(function: str) -> None:
    head, name, body = text_of(pipeline(), RANK).partition(f"def {function}(comm, inputs):")
    (refusal,) = structure(pipeline(), {RANK: head + name + body.replace('"sum"', '"max"', 1)}).refusals
    assert refusal.ranks == (2, 3) and "op=" in refusal.problem and function in refusal.problem, refusal


def test_what_computes_something_else_is_not_proved() -> None:
    text = text_of(pipeline(), RANK).replace("aten_silu(", "aten_neg(", 1)
    (words, *_) = structure(pipeline(), {RANK: text}).unproved
    assert "rank 3: 'forward' of stage 1 was changed" in words
    without = text_of(pipeline(), RANK).partition("\n\n\ndef reduce_gradients")
    schedule = without[2][without[2].index("# schedule") :]
    assert (
        "rank 3: 'reduce_gradients' of stage 1 is missing"
        in structure(pipeline(), {RANK: f"{without[0]}\n\n\n{schedule}"}).unproved
    )


def test_memory_that_is_written_too_early() -> None:
    text = text_of(pipeline(), RANK)
    line = next(line for line in text.splitlines() if "aten_mul_Tensor(add_6, rsqrt)" in line)
    found = structure(pipeline(), {RANK: text.replace(line, line.replace("mul_Tensor", "mul__Tensor"))}).refusals
    assert any("writes into the memory of the input 'add_6'" in one.problem for one in found), found


def test_text_that_is_no_code_of_this_rank() -> None:
    text = text_of(pipeline(), RANK)
    for wrong, words in (
        (text_of(pipeline(), 0), "is of 0, the rank has 1"),
        ("", "is of no stage, the rank has 1"),
        (pipeline().rank(RANK).code, "has 'backward' of stage 1, which no schedule runs"),
        (text.replace("# SEND B1.0 -> 0", "# SEND B1.0"), "'SEND B1.0' is no step of a schedule"),
        (text.replace("# F1.0\n", "# G1.0\n"), "'G1.0' is no step of a schedule"),
    ):
        with pytest.raises(ProofError, match=words):
            read_text(pipeline(), wrong, RANK)


def test_the_steps_are_those_of_the_schedule() -> None:
    schedule = pipeline().required_schedule
    for rank in range(4):
        assert read_text(pipeline(), text_of(pipeline(), rank), rank).steps == schedule.ranks[rank // 2]
