"""The loss of a model on data that it is not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from autopar.data.batch_source import Source
from autopar.data.parts import Share
from autopar.training.calls import loss_after, moved


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on, and when: after every so many steps, and after the last one of the run.

    ``most``: batches of each evaluation; None: all of them.
    """

    source: Source
    every: int | None = None
    most: int | None = None

    def is_due(self, done: int, steps: int) -> bool:
        """Whether there is an evaluation after ``done`` of ``steps`` steps."""
        return done == steps or self.every is not None and done % self.every == 0

    def loss(self, model: nn.Module, share: Share | None, device: torch.device) -> float:
        """The mean of the losses of the batches, each by its rows, in evaluation mode. All ranks call it together."""
        total, rows, was_training = 0.0, 0, model.training
        model.eval()
        try:
            with torch.no_grad():
                for batch in self.source.once(self.most, share):
                    count = self.source.counts(batch).rows
                    total += float(loss_after(model, moved(batch, device))) * count
                    rows += count
        finally:
            model.train(was_training)
        return total / max(1, rows)
