"""BERT: a bidirectional encoder trained to fill in masked tokens (Devlin et al. 2018, arXiv:1810.04805).

Post-LN blocks, separate Q, K and V linears, exact GELU, and a head tied to the token embedding. The pooler and the
next-sentence loss are left out.

Sizes in the shape comments: B batch, T tokens, C width, H heads, D = C / H, f MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """At most `context` positions; `width` is a multiple of `heads`; `mask_id` is the token that hides others."""

    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    ff: int
    mask_id: int = 103
    eps: float = 1e-12


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=48, layers=2, heads=12, ff=192, mask_id=3),
    "bert_base": Config(vocab=30522, context=512, width=768, layers=12, heads=12, ff=3072),
    "bert_large": Config(vocab=30522, context=512, width=1024, layers=24, heads=16, ff=4096),
}


class Attention(nn.Module):
    """Bidirectional multi-head self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.o = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C); mask (B, 1, 1, T), true where a key may be seen."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        v = self.v(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        out: Tensor = self.o(y.transpose(1, 2).reshape(B, T, C))
        return out  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP, each normalised after its residual sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.ln1 = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ff)
        self.down = nn.Linear(config.ff, config.width)
        self.ln2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.ln1(x + self.attn(x, mask))  # (B, T, C)
        out: Tensor = self.ln2(x + self.down(F.gelu(self.up(x))))  # (B, T, C) -> (B, T, f) -> (B, T, C)
        return out


class Bert(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.segments = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.transform = nn.Linear(config.width, config.width)
        self.transform_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.vocab)
        self.head.weight = self.tokens.weight  # tied; the bias is the head's own
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02) matrices, zero biases; post-LN needs no scaling of the residual writers."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All (B, T): `labels` -100 but at hidden tokens, `attention_mask` 0 at padding, `token_type_ids` 0 or 1."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T)
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids  # (B, T)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        x = self.norm(self.tokens(input_ids) + self.positions(positions) + self.segments(segments))  # (B, T, C)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.transform_norm(F.gelu(self.transform(x))))  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.view(-1, self.config.vocab), labels.reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> Bert:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return Bert(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: Bert | Config,
    batch: int = 12,
    length: int | None = None,
    seed: int = 0,
    padding: bool = False,
) -> dict[str, Tensor]:
    """Random tokens and labels (B, T): row i hides 15% of its tokens and i more (modulo T/2).

    With `padding`, an `attention_mask` (B, T) too: row i ends in i tokens (modulo T/2) that no one sees or predicts.
    """
    config = model_or_config if isinstance(model_or_config, Config) else model_or_config.config
    T = config.context if length is None else length
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(config.vocab, (batch, T), generator=generator)  # (B, T)
        extra = torch.arange(batch)[:, None] % max(1, T // 2)  # (B, 1)
        rank = torch.rand(batch, T, generator=generator).argsort(dim=1).argsort(dim=1)  # (B, T)
        seen = torch.arange(T) < T - extra if padding else torch.ones(batch, T, dtype=torch.bool)  # (B, T)
        hidden = (rank < max(1, T * 15 // 100) + extra) & seen  # (B, T)
        input_ids = tokens.masked_fill(hidden, config.mask_id)
        labels = tokens.masked_fill(~hidden, -100)
    inputs = {"input_ids": input_ids, "labels": labels}
    return inputs | {"attention_mask": seen.long()} if padding else inputs
