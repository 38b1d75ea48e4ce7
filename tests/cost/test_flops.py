"""Counting operations, against torch's own counter and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autopar.compiler import compile_program
from autopar.cost.flops import flops
from autopar.ir.layout import Layout
from autopar.ir.node import Value, set_values, value
from autopar.ir.operator_facts import is_product
from autopar.mesh import Mesh
from autopar.operators import TILE, masked_attention
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import slow_but


def counted(model: nn.Module, batch: dict[str, torch.Tensor], mesh: Mesh) -> tuple[int, int]:
    """Operations in products of one rank, forward and backward."""
    program = compile_program(model, mesh, Plan(check_numerics=False), (), batch)
    role = program.required_role
    assert role.backward is not None

    def total(graph: torch.fx.Graph) -> int:
        return sum(
            flops(node, lambda kind: kind.layout.local_shape(mesh)) for node in graph.nodes if is_product(node.target)
        )

    return total(role.forward), total(role.backward)


def test_scores_that_a_formula_leaves() -> None:
    """Of 64 queries and keys, 2 heads of 8; or of a fourth of 256. Causality alone halves nothing, but in a ring."""
    graph = torch.fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for node in (q, k, v):
        set_values(node, Value(torch.float32, Layout.whole((1, 2, 64, 8))))
    causal = graph.call_function(masked_attention, (q, k, v, None, [], "j<=i"))
    far = graph.call_function(TILE, (q, k, v, None, [], None, "j<=i & i-j<4", 2, 4, False, None))
    near = graph.call_function(TILE, (q, k, v, None, [], None, "j<=i", 1, 4, True, None))
    for node in (causal, far, near):
        set_values(node, value(q))
    found = [flops(node, lambda kind: kind.shape) for node in (causal, far, near)]
    assert found == [2 * 2 * pairs * (8 + 8) for pairs in (64 * 64, 0, 64 * 64 // 2)]
    for node in (q, k, v):
        set_values(node, Value(torch.float32, Layout.whole((1, 2, 8192, 8))))
    window = graph.call_function(masked_attention, (q, k, v, None, [], "j<=i & i-j<512"))
    set_values(window, value(q))
    assert flops(window, lambda kind: kind.shape) < flops(causal, lambda kind: kind.shape) / 8


@pytest.mark.parametrize("name", slow_but([0, 1, 3], ["mlp", "cnn", "gpt", "llama", "t5"]))
def test_as_torch_counts(name: str) -> None:
    example = named_model(name, batch=4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = example.model(**example.batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    backward = counter.get_total_flops() - forward
    found = counted(example.model, example.batch, Mesh())
    assert found[0] == forward
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    extra = found[1] - backward  # the scores are computed again, where torch's plain attention has kept them
    assert 0 <= extra <= attention / 4 and (extra == 0) == (attention == 0)


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2}])
def test_a_rank_does_its_part(axes: dict[str, int]) -> None:
    example = named_model("mlp", batch=4)
    mesh = Mesh(**axes)
    whole, part = (counted(example.model, example.batch, on) for on in (Mesh(), mesh))
    assert [count * mesh.world_size for count in part] == list(whole)


def test_what_only_moves_data_counts_nothing() -> None:
    class Moving(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.transpose(0, 1).reshape(4, 6), x.view(4, 6)]).flip(0) * 2

    x = torch.ones(3, 8, requires_grad=True)
    role = compile_program(Moving(), Mesh(), Plan(), (x,)).required_role
    assert sum(flops(node, lambda kind: kind.shape) for node in role.forward.nodes) == 48


class Chosen(nn.Module):
    """Two of four experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,tkio->tko", x, self.weight[ids]).sum()


def test_experts_count_for_the_tokens_that_they_get() -> None:
    batch = {"x": torch.randn(10, 8), "ids": torch.randint(4, (10, 2))}
    forward, backward = counted(Chosen(), batch, Mesh())
    assert forward == backward == 2 * 10 * 2 * 8 * 6  # backward: the gradient of the weight alone
