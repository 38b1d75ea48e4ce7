"""Results that kernels lay out in memory otherwise than their meta forms say, with a view behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.check import check


class NormalisedColumns(nn.Module):
    """Batch normalisation of a transposed tensor, twice; its derivative takes the result as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        for _ in range(2):
            h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.maximum(h, 0.5 - h))[:, :-1].reshape(-1, 6).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mesh", ["dp=1", "tp=3"])
def test_a_view_of_what_a_kernel_lays_out_its_own_way(mesh: str) -> None:
    torch.manual_seed(0)
    report = check(NormalisedColumns(), {"x": torch.randn(2, 2, 2)}, Mesh.parse(mesh), Plan(check_numerics=False))
    assert report.worst <= 1e-12, report
