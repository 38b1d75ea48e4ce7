"""A model in float64 with batches of unequal numbers of labels, and what one device learns of them in five steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS, RATE, ROWS, LENGTH, WORDS, WIDTH = 5, 0.5, 4, 6, 11, 8
Batch = dict[str, Tensor]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 16)
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.up(self.tokens(ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def model_of() -> Words:
    torch.manual_seed(0)
    return Words().double()


def _batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=made)
    labels = ids.roll(-1, 1)
    labels[0, 2:] = -100
    return {"ids": ids, "labels": labels}


BATCHES = [_batch(seed) for seed in range(STEPS)]


def expected(accumulation: int = 1, max_norm: float | None = None) -> dict[str, Tensor]:
    """The parameters that a loop of plain torch gives; the loss of a step is the mean of its batches' losses."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for number, batch in enumerate(BATCHES, 1):
        loss: Any = model(**batch)["loss"] / accumulation
        loss.backward()
        if number % accumulation == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}
