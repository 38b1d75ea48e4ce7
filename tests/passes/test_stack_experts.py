"""Loops over experts become products with stacked weights: the spellings, what is left alone, the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, Reference, check
from autopar.compiler import split_program
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.operators.experts import EXPERT_LINEAR
from autopar.plan import Plan
from tests.loops_over_experts import (
    EXPERTS,
    LOOPS,
    WIDTH,
    Chunked,
    Gated,
    Loop,
    Matrices,
    Mixture,
    Plain,
    dense,
    index_add,
    mixtral,
    tokens_of_mask,
    where,
)  # fmt: skip
from tests.passes.canonical import counts
from tests.selection import slow_but

MESHES = (("dp=1", Plan()), ("dp=2", Plan()), ("tp=2", Plan()), ("dp=2", Plan(zero=3)))
ALL_AT_ONCE = (("dp=2,tp=2", Plan(zero=3)),)


def rows(batch: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(1))}


def program(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Program:
    found = split_program(model, Mesh(), Plan(), (), batch or rows(), after="recognise_experts")
    assert isinstance(found, Program)
    return found


def products(found: Program) -> list[tuple[Any, ...]]:
    """The shapes of the rows and of the weights of the products with stacked weights."""
    nodes = [node for node in found.graph.nodes if node.target is EXPERT_LINEAR]
    return [tuple(tuple(value(source).shape) for source in node.all_input_nodes[:2]) for node in nodes]


@pytest.mark.parametrize("loop", slow_but([1, 2, 3, 6], LOOPS), ids=lambda loop: loop.__name__)
def test_every_spelling_is_two_products(loop: Loop) -> None:
    found = program(Mixture(loop))
    assert products(found) == [((12, WIDTH), (EXPERTS, WIDTH, 12)), ((24, 12), (EXPERTS, 12, WIDTH))]
    assert counts(found)["aten.linear"] == 1  # the router
    left = {"aten.eq", "aten.masked_fill", "aten.where", "aten.repeat_interleave", "aten.one_hot", "aten.nonzero"}
    assert not any(name.startswith(tuple(left)) for name in counts(found))


@pytest.mark.parametrize("unused", slow_but([0], [False, True]), ids=["all_used", "one_unused"])
@pytest.mark.parametrize("loop", slow_but([0, 4, 5], LOOPS), ids=lambda loop: loop.__name__)
def test_every_spelling_is_exact(loop: Loop, unused: bool) -> None:
    reference = Reference(Mixture(loop, unused=unused), rows())
    for mesh, plan in ALL_AT_ONCE if unused else MESHES:
        assert reference.check(Mesh.parse(mesh), plan).worst <= 1e-12


@pytest.mark.parametrize(
    ("expert", "count"),
    slow_but([0, 2], [(Gated, 3), (Chunked, 1), (Matrices, 2)]),
    ids=["gated", "chunked", "matrices"],
)
def test_experts_of_other_forms(expert: type[nn.Module], count: int) -> None:
    for loop in (where, tokens_of_mask, dense):
        model = Mixture(loop, expert)
        assert len(products(program(model))) == count
        reference = Reference(model, rows())
        assert all(reference.check(Mesh.parse(mesh), plan).worst <= 1e-12 for mesh, plan in ALL_AT_ONCE)


@pytest.mark.parametrize("choices", slow_but([1], [1, 3]))
def test_one_and_three_choices(choices: int) -> None:
    for loop in (where, mixtral, tokens_of_mask, dense):
        model = Mixture(loop, choices=choices)
        assert len(products(program(model))) == 2
        assert check(model, rows(), Mesh(dp=2, tp=2)).worst <= TOLERANCE


class Routed(nn.Module):
    """Ids that come from outside: nothing bounds them, and a row may name one expert twice."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.loop = nn.ModuleList(Plain() for _ in range(EXPERTS)), loop

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self.loop(self.experts, x, weights, chosen).square().sum()


def test_ids_of_no_expert_add_nothing() -> None:
    chosen = torch.tensor([[0, 0], [1, 7], [-1, 2], [3, 3]])
    batch = {"x": torch.randn(4, WIDTH), "weights": torch.rand(4, 2), "chosen": chosen}
    model = Routed(index_add)
    assert len(products(program(model, batch))) == 2
    reference = Reference(model, batch)
    assert all(reference.check(Mesh.parse(mesh), plan).worst <= 1e-12 for mesh, plan in MESHES)


class Unlike(nn.Module):
    """Experts that differ in more than their weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(Plain() for _ in range(3))
        self.gate = nn.Linear(WIDTH, 3)
        if kind == "activation":
            self.experts[1][1] = nn.GELU()
        elif kind == "width":
            self.experts[2] = Plain(5)
        elif kind == "frozen":
            self.experts[0][0].weight.requires_grad_(False)
        elif kind == "shared":
            self.experts[2] = self.experts[0]

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.gate(x).softmax(-1), 2)
        return where(self.experts, x, weights, chosen).square().sum()


@pytest.mark.parametrize("kind", ["activation", "width", "frozen", "shared"])
def test_experts_that_differ_stay_apart_and_exact(kind: str) -> None:
    batch = {"x": torch.randn(8, WIDTH)}
    model = Unlike(kind)
    assert len(products(program(model, batch))) < 2
    reference = Reference(model, batch)
    assert all(reference.check(Mesh.parse(mesh), plan).worst <= 1e-12 for mesh, plan in ALL_AT_ONCE)


class Mixed(Mixture):
    """The rows of each expert are compared with each other."""

    def __init__(self) -> None:
        super().__init__(dense)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(0)) for _ in range(EXPERTS))


def test_experts_that_mix_rows_stay_apart() -> None:
    assert not products(program(Mixed()))
    assert check(Mixed(), rows(), Mesh(dp=2)).worst <= TOLERANCE


class Indexed(nn.Module):
    """The experts' matrices are elements of two tensors, as in ``w[number]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 3) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.gate(x).softmax(-1), 2)
        out = torch.zeros_like(x)
        for number in range(EXPERTS):
            token, place = torch.where(chosen == number)
            y = torch.relu(x[token] @ self.up[number] + self.shift[number]) @ self.down[number]
            out.index_add_(0, token, y * weights[token, place, None])
        return out.square().sum()


def test_elements_of_one_tensor_are_that_tensor() -> None:
    """Their stack has nothing of its own that could be undone; and ``ep`` deals out the tensor."""
    batch = {"x": torch.randn(8, WIDTH)}
    found = program(Indexed(), batch)
    assert len(products(found)) == 2 and not {"aten.stack", "aten.select.int"} & set(counts(found))
    assert Reference(Indexed(), batch).check(Mesh.parse("ep=2,dp=2")).worst <= 1e-12
