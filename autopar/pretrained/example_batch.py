"""A batch like those of a Hugging Face model's task, to make a program with before there is one of the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.tasks import task_of_class

LENGTH = 512  # tokens of a row, where the model has positions for so many
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")  # how configs call it


def example_batch(model: nn.Module, mesh: Mesh, plan: Plan) -> dict[str, Tensor]:
    """Arguments by name, as the task of the model's class has them; the same on every rank.

    The number of rows and that of tokens divide by all axes of ``mesh`` and by the microbatches; floating-point inputs
    have the dtype of the parameters. Raises ValueError for a model of which it is not known what it takes.
    """
    task = task_of_class(type(model).__name__)
    if task is None:
        raise ValueError(
            f"it is not known what a batch of {type(model).__name__} is\n"
            "Way out: example_inputs=batch, the arguments by name of a call like those that follow."
        )
    config: Any = getattr(model, "config", None)
    rows = mesh.world_size * (plan.microbatches or 1)
    with torch.device("cpu"):
        made = task.batch(config, rows, _length(config.get_text_config(), mesh), torch.Generator().manual_seed(0))
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in made.items()}


def _length(text: Any, mesh: Mesh) -> int:
    """At most LENGTH tokens, and as many as the config ``text`` has positions; a multiple of what axes may need."""
    limits = [getattr(text, key, None) for key in POSITIONS]
    limit = next((found for found in limits if isinstance(found, int)), LENGTH)
    ways = 2 * mesh.world_size
    return max(min(LENGTH, limit) // ways * ways, ways)
