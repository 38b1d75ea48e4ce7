"""Arguments for the ``Trainer`` of Lightning, with which it leaves processes and gradients to a parallel module.

lightning.Trainer(**autopar.lightning_arguments(model), max_epochs=1).fit(loop, loader)
"""

from __future__ import annotations

from typing import Any

from autopar.errors import LaunchError
from autopar.module import ParallelModule, held_by


def lightning_arguments(model: ParallelModule) -> dict[str, Any]:
    """``strategy`` and ``plugins``: each rank runs a loop of its own on its device, with the whole batches.

    Ranks do the same steps, and the module communicates in them. Checkpoints of Lightning would hold the parts of one
    rank: ``enable_checkpointing`` is False, and so is the logger but on rank 0. Raises LaunchError on a pipeline, whose
    forward and backward are one: ``train_step``.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import SingleDeviceStrategy

    if model.mesh.is_pipelined:
        raise LaunchError(
            "on a pipeline forward and backward are one, and Lightning calls them one after the other\n"
            "Way out: self.automatic_optimization = False, and model.train_step(**batch) in training_step, with\n"
            "SingleDeviceStrategy(device) as strategy; or a loop of your own; or a mesh without pp."
        )
    connection = held_by(model).weights.connection
    device = connection.comm.device if connection else "cpu"
    found: dict[str, Any] = {
        "strategy": SingleDeviceStrategy(device),
        "plugins": [LightningEnvironment()],
        "enable_checkpointing": False,
    }
    if connection is not None and connection.rank:
        found |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return found
