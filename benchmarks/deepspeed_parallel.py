"""The peer: DeepSpeed's engine, with ZeRO 0 to 3 or with its automatic tensor parallelism (AutoTP).

    pip install wheel einops && DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed

It runs on CPUs without any operator of its own built, on the process group that there is. Its settings are its own
defaults, but for what an optimizer that it has not been tried with needs, and that gradients are not clipped. Where it
is not installed, or on no CPU, :func:`missing` says so in words.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contenders import Contender, Optimizers
from benchmarks.subjects import Batch

HOW = "pip install wheel einops && DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"


def missing() -> str:
    """Why DeepSpeed cannot be measured; empty where it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return f"DeepSpeed is not installed ({HOW})"
    return ""


def deepspeed() -> Any:
    """The package, told that it is on a CPU and need not report."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    found = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return found


class DeepSpeed(Contender):
    """``model`` in DeepSpeed's engine with ZeRO stage ``zero``, or split over all ranks by AutoTP; collective.

    ``optimizer`` makes the optimizer that the engine wraps. ``more``: other sections of the engine's settings.
    """

    def __init__(
        self, model: nn.Module, batch: int, optimizer: Optimizers, *, zero: int = 0, tensor: int = 1, **more: Any
    ) -> None:
        self.ranks = dist.get_world_size() // tensor
        self.rank = dist.get_rank() // tensor
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch // self.ranks,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "gradient_clipping": 0.0,  # of itself it clips to a norm of 1, which none of the others does
            **more,
        }
        if tensor > 1:
            config["tensor_parallel"] = {"autotp_size": tensor}
        made = optimizer(model.parameters())
        self.engine, *_ = deepspeed().initialize(model=model, optimizer=made, config=config)
        self.module = self.engine
        self.optimizer = _Step(self.engine)  # type: ignore[assignment]

    def part(self, batch: Batch) -> Batch:
        return {name: whole.chunk(self.ranks)[self.rank].contiguous() for name, whole in batch.items()}

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def whole_loss(self, loss: Tensor) -> float:
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


class _Step:
    """The engine's step, which also lets the gradients go."""

    def __init__(self, engine: Any) -> None:
        self.step = engine.step

    def zero_grad(self) -> None:
        """It is done."""
