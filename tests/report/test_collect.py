"""What a report says is what the program does: compared with what is counted elsewhere."""

from __future__ import annotations

from collections import Counter

import pytest

from autopar.analysis.footprint import held, sent
from autopar.ir.program import PipelinedProgram
from autopar.memory.device import Device
from autopar.memory.table import memory_of
from autopar.report.collect import report_of
from autopar.report.document import Block
from tests.report.programs import parameters, program_of, reported


def test_repeated_blocks_are_one_entry_on_all_their_places() -> None:
    report = reported("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",))
    (blocks,) = [child for child in report.modules.children if child.name == "blocks"]
    (block,) = blocks.children
    assert (block.name, block.times) == ("0..1", 2)
    assert sorted({place for where in block.where for place in where.places}) == [0, 1]
    assert [(where.first, where.last) for where in block.where] == [(0, 0), (1, 1)]
    shown = {one.target: one for one in parameters(report.modules)}
    assert not any(target.startswith("blocks.1") for target in shown)
    assert shown["blocks.0.up.weight"].places == (0, 1)
    assert report.modules.bytes == held(program_of("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",))).whole


@pytest.mark.slow
def test_experts_are_drawn_over_their_axis() -> None:
    report = reported("moe", "ep=2,dp=2", zero=3)
    assert report.parameter_bytes == report.modules.bytes
    experts = [one for one in parameters(report.modules) if ".experts." in one.target]
    drawn = [report.drawings[one.drawing] for one in experts]
    assert drawn and all("ep" in one.axes and one.rank_bytes < one.bytes for one in drawn)


def forward_bytes(blocks: tuple[Block, ...]) -> Counter[str]:
    total: Counter[str] = Counter()
    for block in blocks:
        for call in block.calls:
            total[call.axis] += call.sent_bytes * len(block.copies)
    return +total


def test_collectives_of_blocks_send_what_a_step_sends() -> None:
    program, report = program_of("mlp", "dp=2,tp=2"), reported("mlp", "dp=2,tp=2")
    wanted = Counter[str]()
    for one in sent(program):
        wanted[one.axis] += one.bytes if one.phase == "forward" else 0
    assert forward_bytes(report.blocks) == +wanted
    assert sum(one.bytes for one in report.traffic) == sum(one.bytes for one in sent(program))
    entering = [call for block in report.blocks for call in block.calls if call.kind == "entrance"]
    assert entering and all(call.backward == "all_reduce" and call.backward_bytes for call in entering)


def test_graphs_of_blocks_are_joined() -> None:
    for block in reported("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",)).blocks:
        assert all(0 <= a < len(block.calls) and 0 <= b < len(block.calls) and a != b for a, b in block.edges)
        for number, call in enumerate(block.calls):
            inputs = [a for a, b in block.edges if b == number]
            assert (call.kind == "input") <= (not inputs) and (call.kind == "output") <= (len(inputs) == 1)


def test_memory_peaks_where_the_table_says() -> None:
    program = program_of("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",))
    assert isinstance(program, PipelinedProgram)
    wanted = {one.place: one for one in memory_of(program, "adamw").ranks}
    report = reported("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",))
    assert [one.place for one in report.memory] == [0, 1]
    for one in report.memory:
        top = one.moments[one.highest]
        assert sum(top.held) == one.peak == wanted[one.place].peak
        assert top.phase == wanted[one.place].phase
        assert dict(zip(one.kinds, top.held))["optimizer"] == wanted[one.place].optimizer > 0
        assert all(earlier.at <= later.at for earlier, later in zip(one.moments, one.moments[1:]))


def test_the_pipeline_is_that_of_the_schedule() -> None:
    report = reported("mlp", "pp=2,tp=2", microbatches=2, cuts=("blocks.1",))
    assert report.pipeline is not None and report.pipeline.microbatches == 2
    assert Counter(span.kind for span in report.pipeline.spans) == {"F": 4, "B": 4}
    assert reported("mlp", "dp=2,tp=2").pipeline is None


def test_reasons_name_alternatives() -> None:
    reasons = reported("mlp", "dp=2,tp=2").reasons
    assert {one.chosen for one in reasons} >= {"split by rows", "split by columns"}
    assert any(
        "blocks.*.up.weight (2)" in one.names and "whole on every rank would cost" in one.instead for one in reasons
    )


def test_what_zero_splits_says_so() -> None:
    report = reported("mlp", "dp=2,tp=2", zero=3)
    (up,) = [one for one in parameters(report.modules) if one.target == "blocks.0.up.weight"]
    assert "split by ZeRO, as Plan(zero=3) asks" in "".join(up.reasons) and "split by rows over tp" in "".join(
        up.reasons
    )
    assert report.drawings[up.drawing].axes == ("dp", "tp")


def test_a_device_that_is_too_small() -> None:
    program = program_of("mlp", "dp=2,tp=2")
    largest = memory_of(program, "sgd").largest
    report = report_of("mlp", program, "sgd", device=Device(largest.peak - 1, fixed=0, share=0.0))
    assert report.device is not None and report.device.needed == report.device.bytes + 1 == largest.peak
    assert report.device.helps and report.optimizer == "sgd"
