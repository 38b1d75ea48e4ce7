"""A recurrent language model: embedding, LSTM (GRU, RNN) layers, linear head (Zaremba et al. 2014, arXiv:1409.2329).

Sizes in the shape comments: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@dataclass(frozen=True)
class Config:
    """`cell` is one of CELLS; `context` is the length of the example batch, any length will do."""

    vocab: int
    context: int
    width: int
    layers: int
    cell: str = "lstm"
    dropout: float = 0.0
    batch_first: bool = True


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=48, layers=2),
    "ptb_medium": Config(vocab=10000, context=35, width=650, layers=2, dropout=0.5),
    "ptb_large": Config(vocab=10000, context=35, width=1500, layers=2, dropout=0.65),
}


class Recurrent(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.layers = CELLS[config.cell](
            config.width, config.width, config.layers, batch_first=config.batch_first, dropout=config.dropout
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.vocab)
        nn.init.uniform_(self.tokens.weight, -0.05, 0.05)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both (B, T); a label of -100 is not predicted. Token t predicts the label of t + 1."""
        x = self.dropout(self.tokens(input_ids))  # (B, T, C)
        if self.config.batch_first:
            y, _ = self.layers(x)
        else:
            y = self.layers(x.transpose(0, 1))[0].transpose(0, 1)
        logits = self.head(self.dropout(y))  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> Recurrent:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return Recurrent(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: Recurrent | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens (B, T); the first i labels of row i (modulo T/2) are -100."""
    config = model_or_config if isinstance(model_or_config, Config) else model_or_config.config
    T = config.context if length is None else length
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(config.vocab, (batch, T), generator=generator)  # (B, T)
        skipped = 1 + torch.arange(batch)[:, None] % max(1, T // 2)  # (B, 1)
        labels = input_ids.masked_fill(torch.arange(T) < skipped, -100)
    return {"input_ids": input_ids, "labels": labels}
