"""A model that compares the rows of its batch says so before it runs on microbatches."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from autopar.check import Reference
from autopar.mesh import Mesh
from autopar.plan import Plan


class Rows(nn.Module):
    """A linear, and a loss over each row by itself or over all pairs of rows."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.up, self.down, self.pairs = nn.Linear(4, 8), nn.Linear(8, 4), pairs

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu())
        return (y @ y.T).logsumexp(-1).mean() if self.pairs else y.square().mean()


def test_a_loss_over_pairs_of_rows_is_named() -> None:
    torch.manual_seed(0)
    reference = Reference(Rows(pairs=True), {"x": torch.randn(8, 4)})
    with pytest.warns(UserWarning, match="several rows of the batch at once"):
        report = reference.check(Mesh(pp=2), Plan(microbatches=2))
    assert not report.passed


def test_a_loss_over_rows_is_not() -> None:
    torch.manual_seed(0)
    reference = Reference(Rows(pairs=False), {"x": torch.randn(8, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.check(Mesh(pp=2), Plan(microbatches=2)).passed
