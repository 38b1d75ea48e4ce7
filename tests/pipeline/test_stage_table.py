"""What stages hold and send: the estimates against the programs that are run, and the limit of memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autopar.analysis.footprint import held
from autopar.compiler import finish_program
from autopar.errors import StageError
from autopar.ir.node import origin, output_node, values
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.pipeline.assignment import Search, assign_stages
from autopar.pipeline.interval_costs import StageGraph
from autopar.pipeline.stage_table import describe_stages
from tests.pipeline.test_assignment import LLAMA, planned, program_of


def kept_bytes(program: Program) -> int:
    """What forward really hands to backward, without parameters and inputs."""
    role = finish_program(program).required_role
    results = output_node(role.forward).args[0]
    assert isinstance(results, tuple)
    saved = {node for node in results[len(results) - role.saved :] if node.op != "placeholder"}
    kinds = [kind for node in saved for kind in values(node)]
    return sum(math.prod(kind.layout.local_shape(program.mesh)) * kind.dtype.itemsize for kind in kinds)


@pytest.mark.parametrize("name", ["llama", "gpt", "t5", "mlp", "cnn", "lstm"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_estimate_of_kept_activations(name: str, recompute: str) -> None:
    program = planned(program_of(name), recompute=recompute)
    (stage,) = describe_stages(program, assign_stages(program, 1)).stages
    assert stage.activation_bytes == pytest.approx(kept_bytes(program), rel=0.15)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_states_by_zero_stage(zero: int) -> None:
    """P + G + 2 P of AdamW, of which ZeRO leaves a rank its part (Rajbhandari et al. 2020, figure 1)."""
    program = program_of("llama", "dp=2", zero)
    (stage,) = describe_stages(program, assign_stages(program, 1)).stages
    part = held(program).rank
    whole = held(program).whole
    assert part * (2 if zero else 1) == whole
    assert stage.state_bytes == (part if zero == 3 else whole) + (part if zero >= 2 else whole) + 2 * part
    assert stage.parameters == part // 4


def test_shared_parameters_count_in_each_stage() -> None:
    program = program_of("gpt")  # its head is its embedding
    alone = describe_stages(program, assign_stages(program, 1)).stages[0].parameters
    both = describe_stages(program, assign_stages(program, 2)).stages
    (tokens,) = (node for node, entry in program.placeholders(InputKind.PARAMETER) if entry.aliases)
    assert sum(stage.parameters for stage in both) == alone + math.prod(values(tokens)[0].shape)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_sent_is_received(name: str) -> None:
    program = program_of(name)
    found = assign_stages(program, 4)
    table = describe_stages(program, found)
    stage_of, size = found.stage_of, StageGraph(program).costs.bytes
    crossing = {(node, stage_of[user]) for node in stage_of for user in node.users if user in stage_of}
    expected = sum(size([node]) for node, stage in crossing if stage_of[node] != stage)
    assert sum(stage.sent_bytes for stage in table.stages) == expected
    assert sum(stage.received_bytes for stage in table.stages) == expected
    assert table.stages[0].received_bytes == table.stages[-1].sent_bytes == 0


def test_shares_and_text() -> None:
    program = program_of("llama", sizes=LLAMA)
    table = describe_stages(program, assign_stages(program, 4))
    assert sum(stage.flops_share for stage in table.stages) == pytest.approx(1)
    assert sum(stage.time_share for stage in table.stages) == pytest.approx(1)
    assert table.balance == pytest.approx(4 * max(stage.time_share for stage in table.stages))
    lines = str(table).splitlines()
    assert lines[0].split() == [
        "stage", "from", "to", "parameters", "FLOPs", "time", "states", "activations", "memory", "sends"
    ]  # fmt: skip
    assert lines[1].split()[:3] == ["0", "tokens", "blocks.1"] and len(lines) == 6
    assert table.to_json()["stages"][0]["first"] == "tokens"


FLIGHTS = (4, 3, 2, 1)  # of 1F1B


def memory_of(program: Program) -> list[int]:
    table = describe_stages(program, assign_stages(program, 4, FLIGHTS), FLIGHTS)
    return [stage.memory_bytes for stage in table.stages]


def test_memory_is_kept_within_its_limit() -> None:
    program = program_of("llama", sizes=LLAMA)
    free = memory_of(program)
    assert max(free) == free[0], "the first stage holds most microbatches"
    for share in (1.0, 0.9, 0.8):
        limit = share * max(free) / 1e9
        within = planned(program, stage_memory_gb=limit)
        assert max(memory_of(within)) <= limit * 1e9
        balance = [describe_stages(within, assign_stages(p, 4, FLIGHTS)).balance for p in (program, within)]
        assert balance[0] <= balance[1] * 1.05 and (share == 1.0) == (balance[0] == balance[1])


def test_stages_that_do_not_fit() -> None:
    program = program_of("llama", sizes=LLAMA)
    tight = planned(program, stage_memory_gb=4e-3)
    with pytest.raises(StageError) as error:
        assign_stages(tight, 4, FLIGHTS)
    text = str(error.value)
    assert "no cut into 4 stages fits into Plan(stage_memory_gb=0.004)" in text
    assert "stage 0: " in text and "4 x " in text and "Way out" in text
    assert len(text.splitlines()) < 15
    least = float(text.partition("at least ")[2].split()[0])
    assert max(memory_of(planned(program, stage_memory_gb=least * 1.001))) <= least * 1.001e9
    with pytest.raises(StageError):
        assign_stages(planned(program, stage_memory_gb=least * 0.999), 4, FLIGHTS)


def test_given_cuts_that_do_not_fit() -> None:
    program = replace(program_of("llama", sizes=LLAMA))
    with pytest.raises(StageError, match=r"the stages of Plan\(cuts=...\) do not fit(.|\n)*stage 0: (.|\n)*stage 1: "):
        assign_stages(planned(program, cuts=("blocks.4",), stage_memory_gb=1e-3), 2)


def test_cheap_places() -> None:
    """Between blocks, and nowhere that more than twice as much crosses."""
    graph = StageGraph(program_of("llama", sizes=LLAMA))
    places = Search(graph, (1,) * 4).cheap_places(2.0)
    stream = graph.crossing[1]
    assert {graph.crossing[place] // stream for place in places if place < graph.loss - 10} == {1, 2}
    begins = [place for place in places if origin(graph.nodes[place]).module.endswith(".attn_norm")]
    assert len(begins) == 8 and len(places) < len(graph.places_to_cut)
