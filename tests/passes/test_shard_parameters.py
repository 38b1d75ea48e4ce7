"""ZeRO: what is gathered and scattered, on whole meshes, with sizes that do not divide."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import held
from autopar.autodiff.hoist import GATHERING
from autopar.check import TOLERANCE, Reference, check
from autopar.compiler import compile_program
from autopar.ir import collectives as comm
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.passes.shard_parameters import shard_parameters
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import slow_but

STAGES = (1, 2, 3)
MESHES = ("dp=1", "dp=2", "dp=3", "dp=4", "dp=2,tp=2", "dp=3,tp=2", "dp_replicate=2,dp_shard=2")


class Odd(nn.Module):
    """Sizes that nothing divides, a scalar, a vector of two, an unused and a frozen parameter, two that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(7, 13), nn.Linear(13, 7), nn.Linear(7, 13, bias=False)
        self.again.weight = self.up.weight
        self.scale, self.pair = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor([0.5, 2.0]))
        self.unused, self.frozen = nn.Parameter(torch.ones(11)), nn.Parameter(torch.randn(13), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down((self.up(x) * self.scale + self.frozen).tanh())
        return (self.again(h) * self.pair.prod()).square().sum()


def _batch() -> dict[str, Tensor]:
    return {"x": torch.randn(12, 7)}


@pytest.mark.parametrize("mesh", slow_but([0, 2, 5, 6], MESHES))
@pytest.mark.parametrize("stage", STAGES)
def test_sizes_that_do_not_divide(stage: int, mesh: str) -> None:
    plan = Plan(zero=stage, on_indivisible="replicate", check_numerics=False)
    report = check(Odd(), _batch(), Mesh.parse(mesh), plan)
    assert report.worst <= TOLERANCE, report


@pytest.mark.parametrize("mesh", slow_but([2], MESHES))
@pytest.mark.parametrize("name", slow_but([0], ["hf:llama", "hf:gpt2"]))
def test_equals_the_model(name: str, mesh: str) -> None:
    pytest.importorskip("transformers")
    example = named_model(name)
    reference = Reference(example.model, example.batch)
    for stage in STAGES:
        report = reference.check(Mesh.parse(mesh), Plan(zero=stage))
        assert report.worst <= TOLERANCE, (stage, report)


def _program(plan: Plan, **axes: int) -> Program:
    example = named_model("llama", batch=4)
    return compile_program(example.model, Mesh(**axes), plan, (), example.batch)


def test_every_parameter_of_size_is_split() -> None:
    whole = held(_program(Plan(), dp=4))
    assert held(_program(Plan(zero=3), dp=4)).rank == whole.rank / 4
    assert held(_program(Plan(zero=3), dp_replicate=2, dp_shard=2)).rank == whole.rank / 2
    assert held(_program(Plan(zero=3), dp=2, tp=2)).rank <= whole.rank / 4 * 1.01


def _gathers(program: Program) -> tuple[int, int]:
    role = program.required_role
    assert role.backward is not None
    graphs = (role.forward, role.backward)
    counts = [sum(node.target in GATHERING for node in graph.nodes) for graph in graphs]
    return counts[0], counts[1]


def test_when_parameters_are_gathered() -> None:
    forward, backward = _gathers(_program(Plan(zero=3, bucket_mb=0), dp=2))
    assert backward > 0.5 * forward, "again in backward, those that it needs"
    for plan in (Plan(zero=1, bucket_mb=0), Plan(zero=2, bucket_mb=0), Plan(zero=3, reshard_after_forward=False)):
        assert _gathers(_program(plan, dp=2))[1] == 0, plan


@pytest.mark.parametrize("ways", slow_but([1], [2, 4]))
def test_no_byte_more_than_the_formula(ways: int) -> None:
    example = named_model("mlp", {"layers": 4})
    reference = Reference(example.model, example.batch)
    size = sum(parameter.numel() for parameter in example.model.parameters()) * 8
    share = (ways - 1) / ways
    for stage, times in ((0, 2), (1, 2), (2, 2), (3, 3)):
        traffic = reference.check(Mesh(dp=ways), Plan(zero=stage)).step.traffic
        sent = sum(transfer.bytes for transfer in traffic) - 2 * 2 * 8 * share  # loss and count
        assert sent <= times * size * share, (stage, sent / size / share)
        assert sent > (times - 1) * size * share, "backward needs no first weight and no biases again"


def test_shards_lie_where_few_axes_do() -> None:
    program = _program(Plan(zero=3), dp=2, tp=2)
    layouts = [value(node).layout for node, _ in program.placeholders(InputKind.PARAMETER)]
    both = [layout for layout in layouts if layout.axes == {"dp", "tp"}]
    assert both and not any("@dp@tp" in str(layout) or "@tp@dp" in str(layout) for layout in both), layouts


def test_a_stage_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="zero=4"):
        Plan(zero=4)


class Flat(nn.Module):
    """Most of its bytes have no dim of more than 3 elements."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.rest = nn.Parameter(torch.randn(numbers))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.cube.sum() + self.rest.sum()).square().sum()


@pytest.mark.parametrize(("numbers", "ways", "said"), [(8, 4, True), (8, 3, False), (81 * 100, 4, False)])
def test_a_large_parameter_that_stays_whole_is_named(numbers: int, ways: int, said: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = compile_program(Flat(numbers), Mesh(dp=ways), Plan(zero=3), (torch.randn(12, 7),))
    texts = [str(warning.message) for warning in caught if "whole on dp" in str(warning.message)]
    assert len(texts) == said and (held(program).split["dp"] == held(program).whole) == (ways == 3)
    for text in texts:
        assert "'cube'" in text and "[3,3,3,3]" in text and "91.0%" in text and "dp=4" in text and "Way out" in text


PARTLY = """program mesh(dp_replicate=2 dp_shard=2 sp=2)
  p = param p : f64[8,4]
  x = input : f64[6@dp_replicate@dp_shard,4]
  e = comm.enter(p, dp_replicate) : f64[8,4]
  f = comm.enter(e, dp_shard) : f64[8,4]
  y = aten.linear(x, f) : f64[6@dp_replicate@dp_shard,8]
  squares = aten.mul.Tensor(p, p) : f64[8,4]
  g = comm.enter(p, sp) : f64[8,4]
  h = aten.mul.Tensor(g, g) : f64[8,4]
  return y, squares, h"""


def test_a_parameter_that_enters_other_axes_for_each_use_is_gathered_once() -> None:
    program = shard_parameters(parse(PARTLY, Plan(zero=2)))
    assert isinstance(program, Program)
    node = {node.name: node for node in program.graph.nodes}
    gathers = [one for one in program.graph.nodes if one.target in comm.GATHERS]
    assert [(str(one.args[0]), one.args[1]) for one in gathers] == [("enter", "dp_shard+sp")]
    assert node["enter"].args == (node["p"], "dp_replicate"), "reduced over the replicas when it is a part"
    alike = {name: node[name].all_input_nodes[-1] for name in ("y", "squares", "h")}
    assert all(one.args[0] is gathers[0] for one in alike.values())
    assert {name: one.args[1] for name, one in alike.items()} == {
        "y": "sp",
        "squares": "dp_replicate+dp_shard+sp",
        "h": "dp_replicate+dp_shard",
    }
