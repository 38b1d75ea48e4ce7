"""Collectives that are started early and waited for late: where they go, how much is under way, the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from autopar.check import Reference
from autopar.compiler import compile_program, finish_program, place
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.overlap_collectives import overlap_collectives
from autopar.plan import Plan, Precision
from autopar.simulate import simulate
from autopar.zoo.named import named_model
from tests.selection import slow_but

STARTING = {getattr(comm.OPS, name).default for name in comm.STARTED}
WAIT = comm.OPS.wait.default


def program(plan: Plan, mesh: str = "dp=2", layers: int = 4) -> Program:
    example = named_model("llama", {"layers": layers}, batch=4)
    return compile_program(example.model, Mesh.parse(mesh), replace(plan, check_numerics=False), (), example.batch)


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def under_way(graph: fx.Graph) -> list[int]:
    """Before each node the number of bytes that started collectives hold until they are waited for."""
    found, held = [], {}
    for node in calls(graph):
        if node.target in STARTING:
            (source,) = node.all_input_nodes
            held[node] = max(_bytes(node), _bytes(source))
        if node.target is WAIT:
            held.pop(node.all_input_nodes[0])
        found.append(sum(held.values()))
    assert not held, "each has its wait"
    return found


def _bytes(node: fx.Node) -> int:
    kind = value(node)
    return torch.Size(kind.layout.local_shape(Mesh(dp=2))).numel() * kind.dtype.itemsize


def test_a_block_is_gathered_while_the_one_before_is_computed() -> None:
    role = program(Plan(zero=3, overlap_mb=0.01)).required_role
    assert role.backward is not None
    for graph in (role.forward, role.backward):
        nodes = calls(graph)
        gathers = [i for i, node in enumerate(nodes) if node.target is comm.OPS.start_all_gather.default]
        waits = [nodes.index(next(iter(nodes[i].users))) for i in gathers]
        assert gathers == sorted(gathers) and waits == sorted(waits)
        products = [i for i, node in enumerate(nodes) if "mm" in str(node.target) or "linear" in str(node.target)]
        hidden = sum(any(start < i < end for i in products) for start, end in zip(gathers, waits))
        assert hidden >= len(gathers) - 3, "all but the first ones"


@pytest.mark.parametrize("limit", slow_but([0], [0.05, 0.4]))
def test_what_is_under_way_is_bounded(limit: float) -> None:
    role = program(Plan(zero=3, overlap_mb=limit)).required_role
    assert role.backward is not None
    for graph in (role.forward, role.backward):
        largest = max(_bytes(node) for node in graph.nodes if node.target in STARTING)
        assert max(under_way(graph)) <= 2 * max(limit * 1e6, largest), "gathers and reductions"


def test_gradients_are_waited_for_in_the_end() -> None:
    backward = program(Plan(bucket_mb=0.2)).required_role.backward
    assert backward is not None
    nodes = calls(backward)
    starts = [i for i, node in enumerate(nodes) if node.target in STARTING]
    first_wait = next(i for i, node in enumerate(nodes) if node.target is WAIT)
    assert len(starts) > 2 and max(starts) < first_wait
    arranging = {WAIT, torch.ops.aten.slice.Tensor, torch.ops.aten.reshape.default}
    assert {node.target for node in nodes[first_wait:]} <= arranging


def test_tensor_parallel_sums_of_gradients_are_hidden_by_the_weight_gradient() -> None:
    backward = program(Plan(), "tp=2").required_role.backward
    assert backward is not None
    starts = [node for node in calls(backward) if node.target is comm.OPS.start_all_reduce.default]
    assert len(starts) >= 8


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [
        pytest.param("dp=2,tp=2", Plan(sequence="megatron"), id="sums over tp, then dp"),
        pytest.param(
            "tp=2",
            Plan(sequence="megatron", precision=Precision(param="bf16")),
            id="sums and casts",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_weight_gradients_do_not_hold_the_activations_of_other_blocks(mesh: str, plan: Plan) -> None:
    """A gradient of a weight is computed before its block's successor in backward has ended."""
    backward = program(plan, mesh).required_role.backward
    assert backward is not None
    blocks = [block_of(node) for node in calls(backward) if node.target is torch.ops.aten.mm.default]
    numbers = [int(block.rpartition(".")[2]) for block in blocks if is_repeated(block)]
    assert numbers[0] == 3 and numbers[-1] == 0
    assert all(number <= max(numbers[place:]) <= number + 1 for place, number in enumerate(numbers))


@pytest.mark.parametrize(
    "plan", slow_but([1, 3], [Plan(), Plan(zero=2), Plan(zero=3), Plan(zero=3, sequence="megatron")]), ids=str
)
def test_the_same_bits(plan: Plan) -> None:
    example = named_model("gpt", batch=4)
    reference = Reference(example.model, example.batch)
    mesh = Mesh(dp=2, tp=2) if plan.sequence == "megatron" else Mesh(dp=4)
    grads: list[dict[str, Tensor]] = []
    for limit in (0.0, 0.02, 64.0):
        made = finish_program(place(reference.traced, mesh, replace(plan, overlap_mb=limit)))
        started = any(node.target in STARTING for node in made.required_role.forward.nodes)
        started |= any(node.target in STARTING for node in made.required_role.backward.nodes)  # type: ignore[union-attr]
        assert started == (limit > 0)
        grads.append(dict(simulate(made, reference.state, (), reference.batch).grads))
    for found in grads[1:]:
        assert all(torch.equal(found[name], grad) for name, grad in grads[0].items())


def test_nothing_is_left_of_it_on_one_rank() -> None:
    made = program(Plan(zero=3), "dp=1")
    assert not any(node.target in STARTING for node in made.required_role.forward.nodes)


def test_buckets_keep_their_bits() -> None:
    """Two ranks: a sum of two numbers is the same in any order."""
    example = named_model("gpt", batch=4)
    reference = Reference(example.model, example.batch)
    found = []
    for bucket in (0.0, 0.1, 25.0):
        placed = place(reference.traced, Mesh(dp=2), Plan(zero=3, bucket_mb=bucket))
        made = finish_program(placed, after="differentiate")
        made = overlap_collectives(bucket_collectives(made))
        found.append(simulate(made, reference.state, (), reference.batch).grads)
    for grads in found[1:]:
        assert all(torch.equal(grads[name], grad) for name, grad in found[0].items())
