"""Buffers that a state dict does not have, on the ranks of a pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from tests.against_one_process import difference, float64
from tests.launch import run_ranks


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("first", torch.linspace(1, 2, 6), persistent=False)
        self.register_buffer("last", torch.linspace(2, 3, 6), persistent=False)
        self.register_buffer("kept", torch.linspace(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x * self.first))
        return (self.down(y * self.kept) * self.last).square().mean()  # type: ignore[no-any-return]


def whole_state() -> float:
    model, plain = float64(Scaled), float64(Scaled)
    parallel = autopar.parallelize(model, Mesh(pp=2), Plan(microbatches=2, timeout=20.0))
    parallel.train_step(x=torch.ones(4, 6))
    found, expected = parallel.full_state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    return max(difference(found[name], tensor) for name, tensor in expected.items())


def test_a_whole_state_dict_has_what_that_of_the_model_has() -> None:
    assert max(run_ranks(whole_state, 2)) == 0.0
