"""Constants: what is computed once, how small it is kept, what must be computed at each step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from autopar.frontend.numerics import input_tensors, run_graph
from autopar.ir.evaluate import Evaluator
from tests.passes.canonical import Function, canonical, counts, traced


def test_rows_of_a_mask_that_are_equal_are_one_row() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        keep = torch.arange(16) % 3 > 0
        return x * keep[None, :].expand(4, 16).clone()

    program = canonical(traced(Function(masked), torch.randn(4, 16)))
    assert [tuple(tensor.shape) for tensor in program.constants.values()] == [(1, 16)]
    assert counts(program) == {"aten.mul.Tensor": 1}


def test_users_that_do_not_broadcast_get_an_expand() -> None:
    def embedded(x: torch.Tensor) -> torch.Tensor:
        return F.embedding(torch.arange(16)[None].repeat(4, 1), x)

    x = torch.randn(16, 8)
    program = canonical(traced(Function(embedded), x))
    assert [tuple(tensor.shape) for tensor in program.constants.values()] == [(1, 16)]
    (found,) = run_graph(program.graph, input_tensors(program, Function(embedded), (x,), {}))
    assert torch.equal(found, embedded(x))


def test_equal_constants_are_one() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(8) + x.exp() * torch.arange(8)

    assert len(canonical(traced(Function(twice), torch.randn(4, 8))).constants) == 1


def test_equal_positions_are_held_once() -> None:
    def layers(x: torch.Tensor) -> torch.Tensor:
        for scale in range(4):
            x = x.sin()[torch.arange(8).roll(scale)[: len(x)]] * torch.arange(8)
        return x

    program = traced(Function(layers), torch.randn(8))
    known = {node: None for node in program.graph.nodes if node.target is torch.ops.aten.arange.default}
    assert len(known) > 4
    evaluator = Evaluator(known, set(known), 2**20)
    assert all(evaluator.compute(node) for node in known)
    made = {(str(node.args), id(evaluator.result(node))) for node in known}
    assert len(made) == len({written for written, _ in made}), "a tensor for each layer"


def test_random_numbers_and_buffers_are_not_folded() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return x + torch.rand(8) * self.steps

    program = canonical(traced(Noisy(), torch.randn(4, 8)))
    assert counts(program)["aten.rand"] == 1 and not program.constants


def test_big_masks_cost_little_memory() -> None:
    """A mask of 8 x 4096 x 4096 float64 would take 1 GB; only one row of the batch is ever made."""

    def masked(x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(4096)
        keep = (position[None, :, None] >= position[None, None, :]).expand(8, 4096, 4096).clone()
        bias = torch.where(keep, torch.zeros((), dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64))
        return x[:, :1, :1] + bias[:, :1]

    with torch.device("meta"):
        x = torch.empty(8, 4096, 4096, dtype=torch.float64)
    program = canonical(traced(Function(masked), x))
    assert sum(tensor.nbytes for tensor in program.constants.values()) <= 4096 * 8
