"""A model with its optimizer, as one of the two sides of a measurement."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

import autopar
from benchmarks.subjects import Batch

RATE = 1e-3
Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]  # parameters -> what updates them


class Contender:
    """The unmodified model in one process; also what the others have in common."""

    def __init__(self, module: nn.Module, fused: bool) -> None:
        self.module = module
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, fused=fused)

    def updated_by(self, optimizer: Optimizers) -> Self:
        """This, with another optimizer than AdamW."""
        self.optimizer = optimizer(self.module.parameters())
        return self

    def part(self, batch: Batch) -> Batch:
        """What this side is handed of a whole batch."""
        return batch

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.module(**batch))

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def whole_loss(self, loss: Tensor) -> float:
        """That of the whole batch; collective."""
        return float(loss)


class Autopar(Contender):
    """The model as ``autopar.parallelize`` gives it back, compiled."""

    def __init__(self, model: nn.Module, mesh: autopar.Mesh, plan: autopar.Plan, batch: Batch, fused: bool) -> None:
        start = time.perf_counter()
        self.parallel = autopar.parallelize(model, mesh, plan, example_inputs=batch)
        self.compile_seconds = time.perf_counter() - start
        super().__init__(self.parallel, fused)

    def sent(self) -> Counter[str]:
        """Bytes that this rank has sent until now, by axis."""
        found: Counter[str] = Counter()
        for entry in self.parallel.traffic:
            found[entry.axis] += entry.bytes
        return found


class AutoparPipeline(Autopar):
    """On a mesh with pp: forward and backward of a step are one call."""

    def forward(self, batch: Batch) -> Tensor:
        return self.parallel.train_step(**batch)

    def backward(self, loss: Tensor) -> None:
        """It is done."""


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output["loss"]
    return loss
