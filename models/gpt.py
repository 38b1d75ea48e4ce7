"""GPT-2 and GPT-3: a decoder-only transformer (Radford et al. 2019; Brown et al. 2020, arXiv:2005.14165).

Learned positions, pre-LN blocks, one fused QKV linear, a GELU MLP, and an output head tied to the token embedding.
GPT-3's alternating sparse attention is left out: every layer is dense.

Sizes in the shape comments: B batch, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """`vocab` tokens, at most `context` positions; `width` is a multiple of `heads`; the MLP is 4 * `width` wide."""

    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=48, layers=2, heads=12),
    "gpt2": Config(vocab=50257, context=1024, width=768, layers=12, heads=12),
    "gpt_175b": Config(vocab=50257, context=2048, width=12288, layers=96, heads=96),
}


class Attention(nn.Module):
    """Causal multi-head self-attention with one linear for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, T, C)
        q = q.view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return out  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.gelu(self.fc(x), approximate="tanh"))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x)))
        out: Tensor = x + self.drop(self.mlp(self.ln2(x)))
        return out  # (B, T, C)


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.tokens.weight  # tied
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02); what writes into the residual stream is smaller by sqrt(number of writers) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, T); label t is predicted from the tokens before t, -100 is ignored."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T)
        x = self.drop(self.tokens(input_ids) + self.positions(positions))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        return {"loss": next_token_loss(logits, labels), "logits": logits}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored.

    The labels move rather than the logits: T stays whole, and the large tensor is not copied.
    """
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, T)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-100)


def build(preset: str = "tiny", **overrides: Any) -> GPT:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return GPT(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: GPT | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens and labels (B, T); row i ignores its first 1 + i labels (modulo T/2), so rows count unequally."""
    config = model_or_config if isinstance(model_or_config, Config) else model_or_config.config
    T = config.context if length is None else length
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(config.vocab, (batch, T), generator=generator)  # (B, T)
        ignored = 1 + torch.arange(batch) % max(1, T // 2)  # (B)
        labels = input_ids.masked_fill(torch.arange(T) < ignored[:, None], -100)  # (B, T)
    return {"input_ids": input_ids, "labels": labels}
