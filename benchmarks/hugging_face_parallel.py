"""The peer: the tensor parallelism of transformers itself, by the ``tp_plan`` that the model's config has."""

from __future__ import annotations

import tempfile
from typing import Any

import torch.distributed as dist
from torch import nn

from benchmarks.contenders import Contender


class TensorPlan(Contender):
    """``model``, of transformers, split over all ranks as ``tp_plan="auto"`` splits it; collective.

    It is loaded from a folder that rank 0 writes: transformers splits what it loads, no model that there is.
    """

    def __init__(self, model: nn.Module, fused: bool) -> None:
        from transformers.distributed import DistributedConfig

        saved: Any = model
        with tempfile.TemporaryDirectory() as own:
            folder = [own]
            dist.broadcast_object_list(folder, 0)
            if dist.get_rank() == 0:
                saved.save_pretrained(own)
            dist.barrier()
            plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
            split = type(saved).from_pretrained(folder[0], distributed_config=plan)
            dist.barrier()
        split.config.use_cache = False
        super().__init__(split.train(), fused)
