"""Recompute: the same numbers from less memory, in the order of the blocks, for hardly any work or for a third more."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from autopar.api import parallelize
from autopar.autodiff.differentiate import differentiate
from autopar.autodiff.partition import joined, partition
from autopar.check import TOLERANCE, Reference
from autopar.commands.plan_options import read_plan
from autopar.compiler import compile_program, finish_program, place
from autopar.cost.flops import flops
from autopar.frontend.trace import trace
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of
from autopar.ir.node import origin, output_node, values
from autopar.ir.operator_facts import is_free
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, Role
from autopar.mesh import Mesh
from autopar.passes.recompute_activations import recompute_activations
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.simulator.parts import Step
from autopar.zoo.named import Example, named_model
from tests.conftest import Golden
from tests.selection import slow_but

LINEAR = torch.ops.aten.linear.default
CHOICES = ("none", "selective", "full", 0.75, 0.5, 0.25)
TEXT = """
program mesh(dp=1)
  u    = param up.weight   : f32[8,4]
  w    = param down.weight : f32[4,8]
  x    = input             : f32[6,4]
  h    = aten.linear(x, u) : f32[6,8]
  g    = aten.gelu(h)      : f32[6,8]
  y    = aten.linear(g, w) : f32[6,4]
  loss = aten.sum(y)       : f32[]
  return loss=loss
"""


def test_forward_keeps_less_and_backward_recomputes_it(golden: Golden) -> None:
    program = differentiate(parse(TEXT, Plan(recompute="selective")))
    golden("recompute_activations", recompute_activations(program))


@cache
def _llama() -> Example:
    example = named_model("llama", {"layers": 6}, batch=4, length=64)
    example.model.double()
    return example


@cache
def _traced() -> Program:
    return trace(_llama().model, (), _llama().batch, Mesh(), Plan(check_numerics=False))


@cache
def _program(recompute: str | float, mesh: str = "dp=1", zero: int = 0) -> Program:
    """Collectives stand where they belong: without buckets, without overlap."""
    plan = Plan(recompute=recompute, zero=zero, bucket_mb=0, overlap_mb=0)
    return finish_program(place(_traced(), Mesh.parse(mesh), plan))


@cache
def _step(recompute: str | float, mesh: str = "dp=1", zero: int = 0) -> Step:
    return _simulated(_program(recompute, mesh, zero), _llama())


def _simulated(program: Program, example: Example) -> Step:
    model = example.model
    return simulate(program, dict(model.named_parameters()) | dict(model.named_buffers()), (), example.batch, seed=3)


def _role(program: Program) -> tuple[Role, fx.Graph]:
    role = program.required_role
    assert role.backward is not None
    return role, role.backward


def _kept(program: Program) -> int:
    """Bytes of activations that pass from forward to backward."""
    role, _ = _role(program)
    returned: tuple[fx.Node, ...] = output_node(role.forward).args[0]  # type: ignore[assignment]
    outputs, saved = returned[: -role.saved], returned[-role.saved :]
    kinds = [kind for node in saved if node.op != "placeholder" and node not in outputs for kind in values(node)]
    return sum(math.prod(kind.layout.local_shape(program.mesh)) * kind.dtype.itemsize for kind in kinds)


def _operations(program: Program) -> int:
    role, backward = _role(program)
    nodes = (*role.forward.nodes, *backward.nodes)
    return sum(flops(node, lambda kind: kind.layout.local_shape(program.mesh)) for node in nodes)


# ---------------------------------------------------------------- memory and work


@pytest.mark.slow
def test_memory_falls() -> None:
    none, selective, full, *fractions = (_step(choice).peak_bytes[0] for choice in CHOICES)
    assert none > 1.3 * selective > 1.3 * full, (none, selective, full)
    assert none > fractions[0] > fractions[1] > fractions[2], (none, fractions)


def test_a_fraction_is_what_is_kept_at_most() -> None:
    whole = _kept(_program("none"))
    for fraction in (1.0, 0.75, 0.5, 0.25):
        assert fraction - 0.1 < _kept(_program(fraction)) / whole <= fraction
    assert _kept(_program(0.0)) == _kept(_program("full")) < 0.15 * whole
    assert _kept(_program("full")) < _kept(_program("selective")) < 0.6 * whole


def test_work_grows() -> None:
    none, selective, full, *fractions = (_operations(_program(choice)) for choice in CHOICES)
    assert none < selective < 1.02 * none
    assert 1.15 * none < full < 4 / 3 * none
    assert none <= fractions[0] <= fractions[1] <= fractions[2] < full


def test_nothing_in_a_block_but_its_input_is_kept_by_full() -> None:
    role, backward = _role(_program("full"))
    saved = [node for node in list(backward.nodes)[: role.saved] if block_of(node).startswith("blocks.")]
    assert len(saved) == 6, saved
    again = [block_of(node) for node in backward.nodes if node.target is LINEAR]
    counts = Counter(again)
    assert list(counts) == [f"blocks.{layer}" for layer in reversed(range(6))]
    assert set(counts.values()) == {6}, "the last of seven products is not needed again"


def test_blocks_are_made_again_one_by_one() -> None:
    """Between the products of two blocks lies the backward pass of the one."""
    _, backward = _role(_program("full"))
    order = [(node.target, block_of(node)) for node in backward.nodes if block_of(node).startswith("blocks.")]
    for layer in range(5):
        first = order.index((LINEAR, f"blocks.{layer}"))
        above = [
            i for i, (target, block) in enumerate(order) if block == f"blocks.{layer + 1}" and target is not LINEAR
        ]
        assert sum(position > first for position in above) <= 0.1 * len(above)


def test_forward_is_the_same() -> None:
    whole, _ = _role(_program("none", "tp=2"))
    for choice in ("selective", 0.5, "full"):
        role, backward = _role(_program(choice, "tp=2"))
        remaining = iter(_calls(whole.forward))
        assert all(call in remaining for call in _calls(role.forward)), "the same in the same order, without the unused"
        assert all(origin(node).module for node in backward.nodes if node.target is LINEAR)


def _calls(graph: fx.Graph) -> list[str]:
    """What is called, in order, what is free aside."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function" and not is_free(node)]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("mesh", slow_but([0], ["dp=1", "dp=2,tp=2"]))
def test_the_same_bit_for_bit(mesh: str) -> None:
    whole = _step("none", mesh)
    for choice in CHOICES[1:]:
        _assert_same(_step(choice, mesh), whole)


def _assert_same(found: Step, expected: Step) -> None:
    assert found.loss is not None and expected.loss is not None
    assert torch.equal(found.loss, expected.loss) and list(found.grads) == list(expected.grads)
    for name, grad in expected.grads.items():
        assert torch.equal(found.grads[name], grad), name


@pytest.mark.parametrize("mesh", slow_but([0], ["dp=1", "dp=2,tp=2"]))
def test_dropout_is_the_same(mesh: str) -> None:
    example = named_model("gpt", {"dropout": 0.3, "layers": 3})
    steps = []
    for choice in ("none", "selective", "full"):
        plan = Plan(recompute=choice, check_numerics=False)
        steps.append(_simulated(compile_program(example.model, Mesh.parse(mesh), plan, (), example.batch), example))
    for step in steps[1:]:
        _assert_same(step, steps[0])
        assert step.peak_bytes[0] < steps[0].peak_bytes[0]


@pytest.mark.parametrize("name", slow_but([2], ["t5", "moe", "gpt"]))
def test_equals_the_model(name: str) -> None:
    example = named_model(name)
    reference = Reference(example.model, example.batch)
    for choice in ("selective", "full", 0.4):
        for mesh, plan in (
            ("dp=2", Plan(recompute=choice, zero=3)),
            ("tp=2", Plan(recompute=choice, sequence="megatron")),
            ("dp=2,tp=2", Plan(recompute=choice, zero=1)),
        ):
            report = reference.check(Mesh.parse(mesh), plan)
            assert report.worst <= TOLERANCE, (choice, mesh, report)


@pytest.mark.slow
def test_hugging_face() -> None:
    pytest.importorskip("transformers")
    example = named_model("hf:llama")
    reference = Reference(example.model, example.batch)
    for choice in ("selective", "full", 0.4):
        for mesh in ("dp=1", "dp=2,tp=2"):
            report = reference.check(Mesh.parse(mesh), Plan(recompute=choice, zero=3))
            assert report.worst <= TOLERANCE, (choice, mesh, report)


def test_what_runs() -> None:
    """The emitted program, twice, for gradients that add up."""
    example = named_model("llama", {"layers": 2}, batch=4, length=16)
    example.model.double()
    grads = []
    for choice in ("none", "full"):
        module = parallelize(copy.deepcopy(example.model), Mesh(), Plan(recompute=choice, check_numerics=False))
        for _ in range(2):
            module(**example.batch)["loss"].backward()
        grads.append(module.full_grads())
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items()) and grads[0]


# ---------------------------------------------------------------- what is sent


def _sent(step: Step, phase: str) -> int:
    return sum(transfer.bytes for transfer in step.traffic if transfer.phase == phase)


def test_collectives_run_again_only_where_all_does() -> None:
    none, selective, half, full = (_step(choice, "tp=2") for choice in ("none", "selective", 0.5, "full"))
    assert {_sent(step, "forward") for step in (none, selective, half, full)} == {_sent(none, "forward")}
    assert _sent(none, "backward") == _sent(selective, "backward") == _sent(half, "backward")
    assert _sent(none, "backward") < _sent(full, "backward") <= _sent(none, "backward") + _sent(none, "forward")


def _split_between_blocks(recompute: str, layers: int) -> tuple[Program, Example]:
    example = named_model("gpt", {"layers": layers}, batch=2, length=24)
    plan = Plan(sequence="megatron", recompute=recompute, bucket_mb=0, overlap_mb=0, check_numerics=False)
    return compile_program(example.model, Mesh(tp=4), plan, (), example.batch), example


def test_what_a_layer_keeps_of_a_split_sequence_is_what_megatron_says() -> None:
    """Korthikanti et al. 2022, table 2, without dropout: elements of s b h / t, and a number for each row of scores.

    The input of each half 1 + 1, queries, keys and values 3, the result of attention 1, that of the first linear 4.
    """
    kept = [_kept(_split_between_blocks("selective", layers)[0]) // 4 for layers in (2, 3)]
    rows, width, heads, ways = 2 * 24, 48, 12, 4
    assert kept[1] - kept[0] == (10 * rows * width + rows * heads) // ways


def test_a_split_sequence_is_gathered_once_more() -> None:
    none, selective = (_simulated(*_split_between_blocks(choice, 2)) for choice in ("none", "selective"))
    assert all(torch.equal(selective.grads[name], grad) for name, grad in none.grads.items()) and none.grads
    sent = [{t.name: t.bytes for t in step.traffic if t.phase == "backward"} for step in (none, selective)]
    part = 2 * 24 * 48 * 4 // 4 * 3  # bytes that a rank sends to gather the tokens of one product
    assert sent[1]["all_gather"] - sent[0]["all_gather"] == (2 * 2 + 1) * part, (
        "two products in each layer, and the head"
    )
    assert sent[1]["reduce_scatter"] == sent[0]["reduce_scatter"]


def test_parameters_are_gathered_once_more_at_most() -> None:
    for choice in ("selective", "full"):
        program = _program(choice, "dp=2", zero=3)
        role, backward = _role(program)
        gathered = Counter(node.all_input_nodes[0].name for node in backward.nodes if node.target in comm.GATHERS)
        names = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
        assert set(gathered) <= names and set(gathered.values()) == {1}
        forward = sum(node.target in comm.GATHERS for node in role.forward.nodes)
        assert len(gathered) <= forward
        assert _step(choice, "dp=2", zero=3).peak_bytes[0] < _step("none", "dp=2", zero=3).peak_bytes[0]


def test_whole_parameters_stay_with_zero_1() -> None:
    _, backward = _role(_program("full", "dp=2", zero=1))
    assert not [node for node in backward.nodes if node.target in comm.GATHERS]
    assert [node for node in backward.nodes if node.target is LINEAR]
    assert not [node for node in backward.nodes if node.target is comm.OPS.enter.default]


# ---------------------------------------------------------------- blocks that are none


class Shared(nn.Module):
    """One layer that runs six times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + self.layers[0](x)
        return x.square().sum()


class Unnumbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.middle(torch.nn.functional.gelu(self.up(x))))
        return (x + self.down(y)).square().sum()


def _made(model: nn.Module, recompute: str | float) -> Program:
    batch = {"x": torch.randn(24, 8)}
    return compile_program(model, Mesh(), Plan(recompute=recompute), (), batch)


def test_a_layer_that_runs_often_is_cut_into_its_runs() -> None:
    whole, full = _made(Shared(), "none"), _made(Shared(), "full")
    assert _kept(full) < 0.2 * _kept(whole)
    _, backward = _role(full)
    targets = [node.target for node in backward.nodes if node.target in (LINEAR, torch.ops.aten.gelu_backward.default)]
    runs = "".join("L" if target is LINEAR else "g" for target in targets).split("g")
    assert len(runs) == 7 and max(map(len, runs)) <= 2, runs


def test_products_outside_of_blocks_are_kept() -> None:
    whole = _made(Unnumbered(), "none")
    for choice in ("selective", "full", 0.0):
        program = _made(Unnumbered(), choice)
        _, backward = _role(program)
        assert not [node for node in backward.nodes if node.target is LINEAR]
        assert [node for node in backward.nodes if node.target is torch.ops.aten.gelu.default]
        assert _kept(program) < 0.7 * _kept(whole)


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("mesh,zero", [("dp=1", 0), ("dp=2,tp=2", 0), ("dp=2", 3)])
def test_joined_is_the_inverse_of_partition(mesh: str, zero: int) -> None:
    role, backward = _role(_program("none", mesh, zero))
    joint = joined(role.forward, backward, role.saved)
    free = (lambda node: is_free(node) or node.target in comm.GATHERS) if zero else is_free
    forward, again, saved = partition(joint, free)
    assert len(saved) == role.saved
    assert _calls(forward) == _calls(role.forward)
    assert Counter(_calls(again)) == Counter(_calls(backward)), "a gather may wait for a fused sum"


@pytest.mark.parametrize("value", ["half", 1.5, -0.1, True, None])
def test_a_choice_that_there_is_not(value: object) -> None:
    with pytest.raises(ValueError, match=r"recompute=.*'selective', 'full', or a fraction"):
        Plan(recompute=value)  # type: ignore[arg-type]


def test_on_the_command_line() -> None:
    found = [read_plan([f"recompute={text}"]).recompute for text in ("none", "selective", "full", "0.5", "0")]
    assert found == ["none", "selective", "full", 0.5, 0]
    assert Plan.from_json(Plan(recompute=0.5).to_json()).recompute == 0.5
