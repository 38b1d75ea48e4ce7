"""The Transformer of torch's own layers (Vaswani et al. 2017, arXiv:1706.03762): a translator, or a classifier.

The translator is ``nn.Transformer``, the classifier an ``nn.TransformerEncoder`` and a mean over the tokens that are
no padding. Positions are learned; the translator's three vocabularies are one, tied.

Sizes in the shape comments: B batch, S source tokens, T target tokens, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """At most `context` positions; `width` is a multiple of `heads`. With `classes`, a classifier without decoder."""

    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    ff: int
    classes: int = 0
    dropout: float = 0.0
    norm_first: bool = False
    batch_first: bool = True
    pad_id: int = 0


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=48, layers=2, heads=12, ff=192),
    "tiny_classifier": Config(vocab=96, context=24, width=48, layers=2, heads=12, ff=192, classes=12),
    "base": Config(vocab=37000, context=512, width=512, layers=6, heads=8, ff=2048, dropout=0.1),
    "big": Config(vocab=37000, context=512, width=1024, layers=6, heads=16, ff=4096, dropout=0.3),
}


class Embedded(nn.Module):
    """Token and position embeddings, scaled as in the paper."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale = config.width**0.5
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        nn.init.normal_(self.tokens.weight, std=config.width**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        positions = torch.arange(ids.shape[1], device=ids.device)  # (T)
        out: Tensor = self.tokens(ids) * self.scale + self.positions(positions)
        return out


class Translator(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedded = Embedded(config)
        self.transformer = nn.Transformer(
            config.width, config.heads, config.layers, config.layers, config.ff, config.dropout,
            batch_first=config.batch_first, norm_first=config.norm_first,
        )  # fmt: skip
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embedded.tokens.weight  # tied

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`input_ids` (B, S), the others (B, T): padding is `pad_id` in inputs and -100 in `labels`."""
        unseen = input_ids == self.config.pad_id  # (B, S), true at padding
        causal = nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1], device=input_ids.device)
        source, target = self.embedded(input_ids), self.embedded(decoder_input_ids)  # (B, S, C), (B, T, C)
        first = self.config.batch_first
        y = self.transformer(
            source if first else source.transpose(0, 1),
            target if first else target.transpose(0, 1),
            tgt_mask=causal.to(source.dtype),
            tgt_is_causal=True,
            src_key_padding_mask=unseen,
            memory_key_padding_mask=unseen,
        )
        logits = self.head(y if first else y.transpose(0, 1))  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Classifier(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedded = Embedded(config)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, config.ff, config.dropout,
            batch_first=config.batch_first, norm_first=config.norm_first,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=not config.norm_first)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`input_ids` (B, S), `pad_id` at padding; `labels` (B), a class each."""
        unseen = input_ids == self.config.pad_id  # (B, S), true at padding
        x = self.embedded(input_ids)  # (B, S, C)
        first = self.config.batch_first
        y = self.encoder(x if first else x.transpose(0, 1), src_key_padding_mask=unseen)
        y = (y if first else y.transpose(0, 1)).masked_fill(unseen[..., None], 0.0)  # (B, S, C)
        pooled = y.sum(dim=1) / (~unseen).sum(dim=1, keepdim=True)  # (B, C)
        logits = self.head(pooled)  # (B, classes)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> Translator | Classifier:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    config = replace(PRESETS[preset], **overrides)
    return Classifier(config) if config.classes else Translator(config)


def example_batch(
    model_or_config: Translator | Classifier | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random texts: row i ends in i tokens of padding (modulo half the length), in source and target alike."""
    config = model_or_config if isinstance(model_or_config, Config) else model_or_config.config
    T = config.context if length is None else length
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        padding = torch.arange(T) >= T - torch.arange(batch)[:, None] % max(1, T // 2)  # (B, T)

        def texts() -> Tensor:
            return torch.randint(1, config.vocab, (batch, T), generator=generator)

        source = texts().masked_fill(padding, config.pad_id)  # (B, S)
        if config.classes:
            return {"input_ids": source, "labels": torch.randint(config.classes, (batch,), generator=generator)}
        target = texts()  # (B, T)
        begun = F.pad(target[:, :-1], (1, 0), value=1)  # (B, T), what the decoder has seen before each token
    labels = target.masked_fill(padding, -100)
    return {"input_ids": source, "decoder_input_ids": begun.masked_fill(padding, config.pad_id), "labels": labels}
