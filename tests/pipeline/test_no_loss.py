"""A model that returns no loss cannot be trained on a pipeline, and says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autopar
from tests.launch import run_ranks


def refused() -> str:
    model = autopar.parallelize(nn.Linear(4, 4), autopar.Mesh(pp=1), autopar.Plan(microbatches=2))
    with pytest.raises(autopar.AutoparError) as caught:
        model.train_step(input=torch.randn(4, 4))
    return str(caught.value)


def test_train_step_without_a_loss() -> None:
    (said,) = run_ranks(refused, 1)
    assert "returns its loss" in said and "pass labels" in said
