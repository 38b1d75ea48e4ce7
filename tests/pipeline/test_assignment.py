"""Which stage runs which call: what must hold of every assignment, and that it is as good as it can be."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from autopar.compiler import compile_program, split_program
from autopar.cost.machine import Machine
from autopar.errors import StageError
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import origin
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.notes import heard
from autopar.pipeline import interval_costs
from autopar.pipeline.assignment import BALANCE, SLACK, assign_stages
from autopar.pipeline.interval_costs import StageGraph
from autopar.pipeline.stages import Assignment
from autopar.plan import Plan
from autopar.zoo.named import named_model

MODELS = ("llama", "gpt", "t5", "vit", "mlp", "moe", "cnn", "transformer")
LLAMA = (("layers", 8), ("vocab", 12))
WORDY = (("layers", 8), ("vocab", 24000))


@functools.cache
def program_of(name: str, mesh: str = "", zero: int = 0, sizes: tuple[tuple[str, Any], ...] = ()) -> Program:
    example = named_model(name, dict(sizes), batch=4)
    plan = Plan(zero=zero, check_numerics=False)
    return split_program(example.model, Mesh.parse(mesh), plan, (), example.batch)


def planned(program: Program, **choices: Any) -> Program:
    return replace(program, plan=replace(program.plan, **choices))


def first_calls(program: Program, found: Assignment, count: int) -> list[fx.Node]:
    """The first call of each stage in the order of the trace."""
    calls = [node for node in program.graph.nodes if node in found.stage_of]
    return [next(node for node in calls if found.stage_of[node] == stage) for stage in range(count)]


def check(program: Program, found: Assignment, count: int) -> None:
    calls = {node for node in program.graph.nodes if node.op == "call_function"}
    assert set(found.stage_of) | found.duplicated == calls and not set(found.stage_of) & found.duplicated
    assert set(found.stage_of.values()) == set(range(count))
    for node in calls:
        for source in node.all_input_nodes:
            if node in found.duplicated:
                assert source.op == "placeholder" or source in found.duplicated
            elif source in found.stage_of:
                assert found.stage_of[source] <= found.stage_of[node]
                assert node.target is not operator.getitem or found.stage_of[source] == found.stage_of[node]
    assert program.loss is not None
    assert found.stage_of[program.returned[program.loss]] == count - 1


def test_few_places_of_a_long_program(monkeypatch: pytest.MonkeyPatch) -> None:
    program, most = program_of("llama", sizes=LLAMA), 40
    graph = StageGraph(program)
    every = graph.places_to_cut
    monkeypatch.setattr(interval_costs, "MOST_PLACES", most)
    few = StageGraph(program).places_to_cut
    assert set(few) < set(every) and len(few) <= most
    computed = [0, *itertools.accumulate(graph.seconds[node] > 0 for node in graph.nodes)]
    together = -(-computed[-1] // most)
    for place in every:
        near = [other for other in few if abs(computed[other] - computed[place]) < together]
        assert any(graph.crossing[other] <= graph.crossing[place] for other in near)
    check(program, assign_stages(program, 4), 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_what_holds_of_every_assignment(name: str, count: int) -> None:
    program = program_of(name)
    check(program, assign_stages(program, count), count)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("zero", [0, 3])
def test_on_a_mesh(name: str, zero: int) -> None:
    program = program_of(name, "pp=2,dp=2,tp=2", zero)
    found = assign_stages(program, 4)
    check(program, found, 4)
    parameters = {node for node, _ in program.placeholders(InputKind.PARAMETER)}
    used = {user for node in parameters for user in node.users}
    forms = [node for node in used if len(node.all_input_nodes) == 1]
    assert forms and found.duplicated.issuperset(forms), "gathered parameters do not travel"
    moving = [node for node in found.stage_of if comm.TARGETS.get(node.target) == "all_reduce"]
    assert moving, "sums over tp belong to the computation"


def test_values_that_every_stage_makes() -> None:
    duplicated = {origin(node).module for node in assign_stages(program_of("t5"), 2).duplicated}
    assert {"encoder.bias", "decoder.bias"} <= duplicated, "tables of relative positions are smaller than the biases"
    for name in ("t5", "llama", "gpt"):
        program = program_of(name)
        tokens = {node for node, entry in program.placeholders(InputKind.PARAMETER) if entry.target == "tokens.weight"}
        assert not {user for node in tokens for user in node.users} & assign_stages(program, 2).duplicated
    labels = next(node for node, entry in program_of("llama").placeholders(InputKind.INPUT) if entry.target == "labels")
    assert set(labels.users) <= assign_stages(program_of("llama"), 2).duplicated, "labels are at hand everywhere"


def test_a_decoder_embeds_its_tokens_itself() -> None:
    program = program_of("transformer")
    found = assign_stages(program, 4)
    (labels,) = (node for node, entry in program.placeholders(InputKind.INPUT) if entry.target == "decoder_input_ids")
    (look_up,) = (user for user in labels.users if user in found.stage_of)
    encoder = [stage for node, stage in found.stage_of.items() if "encoder" in origin(node).module]
    assert found.stage_of[look_up] >= max(encoder) > 0, "and not the first stage, three stages ahead"


@pytest.mark.parametrize("name", ["llama", "gpt", "t5", "mlp", "vit"])
@pytest.mark.parametrize("count", [2, 3])
def test_as_good_as_trying_every_cut(name: str, count: int) -> None:
    program = program_of(name)
    graph = StageGraph(program)
    nodes, last = graph.nodes, len(graph)
    every = [place for place in range(1, last) if nodes[place].target is not operator.getitem]
    tables = graph.tables(range(last + 1))
    tried = min(
        max(tables.seconds[pair] for pair in itertools.pairwise((0, *cuts, last)))
        for cuts in itertools.combinations(every, count - 1)
        if all(tables.works[pair] and tables.owns[pair] for pair in itertools.pairwise((0, *cuts, last)))
    )
    found = assign_stages(program, count)
    stages = [found.stage_of[node] for node in nodes]
    bounds = [*(stages.index(stage) for stage in range(count)), last]
    worst = max(tables.seconds[pair] for pair in itertools.pairwise(bounds))
    assert stages == sorted(stages)
    assert tried <= worst * (1 + 1e-12) <= SLACK * BALANCE * tried * (1 + 1e-9)


class WorkWithoutParameters(nn.Module):
    """Most of its time is spent behind its last parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for _ in range(12):
            x = (x @ x.transpose(1, 2)).softmax(-1) @ x
        return x.square().mean()


def test_each_rank_gets_a_parameter_where_that_is_possible() -> None:
    """Else torch's optimizers stop one rank, and the others wait for it."""
    batch = {"x": torch.randn(12, 4, 8)}
    for ranks in (2, 3):
        with heard() as messages:
            program = compile_program(WorkWithoutParameters(), Mesh(pp=ranks), Plan(microbatches=6), (), batch)
        assert isinstance(program, PipelinedProgram)
        holding = [stage for stage in program.stages if any(stage.placeholders(InputKind.PARAMETER))]
        assert (len(holding) == ranks) == (ranks == 2)
        assert ["will hold no parameter" in message for message in messages] == [True] * (ranks == 3)


def test_among_equals_the_fewest_bytes() -> None:
    """Blocks of one kind: stages begin where nothing but the residual stream crosses."""
    program = program_of("llama", sizes=LLAMA)
    graph, found = StageGraph(program), assign_stages(program, 2)
    cut = graph.place[first_calls(program, found, 2)[1]]
    assert graph.crossing[cut] == min(graph.crossing[1 : graph.loss - 20])


def test_heads_count() -> None:
    """The larger the vocabulary, the fewer blocks stand beside the head."""
    blocks = []
    for sizes in (LLAMA, WORDY):
        program = program_of("llama", sizes=sizes)
        found = assign_stages(program, 2)
        behind = [node for node, stage in found.stage_of.items() if stage == 1]
        blocks.append(len({block_of(node) for node in behind if is_repeated(block_of(node))}))
    assert 3 <= blocks[0] <= 5 and blocks[1] == 0


def test_another_machine_another_balance() -> None:
    program = program_of("llama", sizes=WORDY)
    core = Machine(flops=5e10, memory=1e10, link=1e9, latency=5e-5)  # processes of one host
    quick = replace(core, memory=1e12)
    assert assign_stages(program, 4, machine=core).stage_of != assign_stages(program, 4, machine=quick).stage_of


def test_more_stages_than_work() -> None:
    program = program_of("mlp")
    works = StageGraph(program).most_stages
    check(program, assign_stages(program, works), works)
    with pytest.raises(StageError, match=rf"{works + 1} pipeline stages .* {works} calls(.|\n)*at most {works}"):
        assign_stages(program, works + 1)


def test_flights_of_each_stage() -> None:
    with pytest.raises(ValueError, match="2 stages, and microbatches in flight for 3"):
        assign_stages(program_of("mlp"), 2, (3, 2, 1))


# ---------------------------------------------------------------- Plan(cuts=...)


def test_stages_begin_where_the_user_says() -> None:
    program = planned(program_of("llama", sizes=LLAMA), cuts=("blocks.2", "blocks.7.mlp"))
    found = assign_stages(program, 3)
    check(program, found, 3)
    modules = [origin(node).module for node in first_calls(program, found, 3)]
    assert modules == ["tokens", "blocks.2.attn_norm", "blocks.7.mlp.gate"]
    assert all(found.stage_of[n] == 1 for n in found.stage_of if origin(n).module.startswith("blocks.7.attn"))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (("blocks.1",), "names 1 modules; 3 stages need 2"),
        (("blocks.1", "bloks.1"), "from a module 'bloks.1'\nWay out: did you mean 'blocks.1'"),
        (("blocks.1", "zzz"), "from a module 'zzz'\nWay out: there are tokens, blocks, blocks.0"),
        (("head", "blocks.1"), "'blocks.1' does not begin after 'head'"),
        (("blocks.1", "blocks.1"), "'blocks.1' does not begin after 'blocks.1'"),
        (("tokens", "blocks.1"), "'tokens' stands where the model begins"),
    ],
)
def test_cuts_that_cannot_be(cuts: tuple[str, ...], message: str) -> None:
    with pytest.raises(StageError, match=message):
        assign_stages(planned(program_of("llama"), cuts=cuts), 3)


def test_choices_of_the_plan() -> None:
    plan = Plan(cuts=("a.1", "b"), stage_memory_gb=40.0)
    assert Plan.from_json(plan.to_json()) == plan
    for wrong in ("a.1", ("",), (3,)):
        with pytest.raises(ValueError, match="names of modules"):
            Plan(cuts=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a number above 0"):
        Plan(stage_memory_gb=0)
