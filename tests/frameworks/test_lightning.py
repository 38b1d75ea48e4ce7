"""Lightning around a parallel module: parameters after five steps against one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autopar
from autopar import Mesh, Plan
from tests.frameworks.steps import BATCHES, RATE, STEPS, expected, model_of
from tests.launch import run_ranks
from tests.selection import slow_but

pytest.importorskip("lightning", reason="pip install lightning")


def trained(mesh: str, accumulation: int) -> dict[str, Tensor]:
    import lightning

    class Loop(lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    model = autopar.parallelize(model_of(), Mesh.parse(mesh), Plan(check_numerics=False))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    how: dict[str, Any] = autopar.lightning_arguments(model) | quiet
    trainer = lightning.Trainer(
        **how, max_steps=STEPS // accumulation, accumulate_grad_batches=accumulation, gradient_clip_val=1.0
    )
    trainer.fit(Loop(model), torch.utils.data.DataLoader(BATCHES, batch_size=None))  # type: ignore[arg-type]
    return model.full_state_dict()


@pytest.mark.parametrize(("mesh", "accumulation"), slow_but([], [("dp=2", 1), ("tp=2", 1), ("dp=2", 5), ("dp=1", 1)]))
def test_parameters_after_five_steps(mesh: str, accumulation: int) -> None:
    wanted = expected(accumulation=accumulation, max_norm=1.0)
    for found in run_ranks(trained, Mesh.parse(mesh).world_size, mesh, accumulation):
        worst = max(float((found[name] - value).abs().max()) for name, value in wanted.items())
        print(f"Lightning on {mesh}, {accumulation} batches a step: {worst:.1e}")
        assert worst < 1e-12
