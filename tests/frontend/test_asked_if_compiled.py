"""Who computes something else where ``torch.compiler.is_compiling()`` gets what a run by itself gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh
from tests.observation.test_observation import compare


class Asks(nn.Module):
    def __init__(self, is_only_check: bool) -> None:
        super().__init__()
        self.linear, self.is_only_check = nn.Linear(4, 4), is_only_check

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.is_only_check and not torch.compiler.is_compiling():
            assert not y.isnan().any()  # of parameters: no trace may look at it
        elif not self.is_only_check and torch.compiler.is_compiling():
            y = y * 2
        return y.square().mean()


def test_a_branch_for_traces_is_not_taken_where_it_computes_something_else() -> None:
    torch.manual_seed(0)
    for is_only_check in (True, False):
        model, x = Asks(is_only_check).double(), torch.randn(4, 4, dtype=torch.float64)
        compare(autopar.parallelize(model, Mesh(dp=2)), model, x)
    assert not torch.compiler.is_compiling()
