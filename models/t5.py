"""T5: an encoder-decoder with relative position biases (Raffel et al. 2019, arXiv:1910.10683).

RMSNorm before every sublayer, ReLU MLPs, no linear biases, unscaled attention scores, one bias table per stack shared
by its layers, one token embedding for both stacks. The heads together may be wider than the model (T5-11B: 16384 and
1024).

Sizes in the shape comments: B batch, S source tokens, T target tokens, Q queries, K keys, C width, H heads,
D head_dim, f MLP, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """`layers` per stack; `context` is only the default source length; `pad_id` also starts the decoder."""

    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    head_dim: int
    ff: int
    tied: bool = True
    buckets: int = 32
    max_distance: int = 128
    pad_id: int = 0
    eps: float = 1e-6


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=48, layers=2, heads=12, head_dim=8, ff=192, buckets=24, max_distance=48),
    "t5_large": Config(vocab=32128, context=512, width=1024, layers=24, heads=16, head_dim=64, ff=4096),
    "t5_11b": Config(vocab=32128, context=512, width=1024, layers=24, heads=128, head_dim=128, ff=65536),
}


def distance_buckets(length: int, buckets: int, max_distance: int, causal: bool, device: torch.device) -> Tensor:
    """The bucket (T, T) of key position minus query position: exact when near, logarithmic up to max_distance.

    Both directions get half of the buckets each, unless `causal`, which keeps the past only (section 2.1).
    """
    positions = torch.arange(length, device=device)  # (T)
    relative = positions[None, :] - positions[:, None]  # (T, T)
    if causal:
        offset, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
    else:
        buckets //= 2
        offset, distance = (relative > 0).long() * buckets, relative.abs()
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # (T, T)
    far_bucket = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far_bucket)


class Attention(nn.Module):
    """Multi-head attention of x on memory; the scores are not scaled by the square root of D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, Q, C), memory (B, K, C), bias added to the scores (B or 1, H or 1, Q or 1, K)."""
        B, Q, _ = x.shape
        K = memory.shape[1]
        q = self.q(x).view(B, Q, -1, self.head_dim).transpose(1, 2)  # (B, H, Q, D)
        k = self.k(memory).view(B, K, -1, self.head_dim).transpose(1, 2)  # (B, H, K, D)
        v = self.v(memory).view(B, K, -1, self.head_dim).transpose(1, 2)  # (B, H, K, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, Q, D)
        out: Tensor = self.o(y.transpose(1, 2).reshape(B, Q, -1))
        return out  # (B, Q, C)


class Block(nn.Module):
    """Self-attention, cross-attention (decoder only), MLP: each normalised before, added after."""

    def __init__(self, config: Config, decoder: bool) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.attn = Attention(config)
        if decoder:
            self.cross_norm = nn.RMSNorm(config.width, eps=config.eps)
            self.cross = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ff, bias=False)
        self.down = nn.Linear(config.ff, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None, memory_bias: Tensor | None) -> Tensor:
        normed = self.attn_norm(x)
        x = x + self.attn(normed, normed, bias)
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), memory, memory_bias)
        out: Tensor = x + self.down(F.relu(self.up(self.mlp_norm(x))))  # (B, Q, C) -> (B, Q, f) -> (B, Q, C)
        return out


class Stack(nn.Module):
    """The encoder or the decoder: blocks that share one table of relative position biases."""

    def __init__(self, config: Config, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        self.bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)

    def position_bias(self, length: int) -> Tensor:
        """What is added to the self-attention scores, (1, H, T, T); the decoder's future is -inf."""
        table = self.bias.weight
        buckets = distance_buckets(
            length, self.config.buckets, self.config.max_distance, self.decoder, table.device
        )  # (T, T)
        bias: Tensor = self.bias(buckets).permute(2, 0, 1)[None]  # (1, H, T, T)
        if self.decoder:
            past = torch.ones(length, length, dtype=torch.bool, device=table.device).tril()  # (T, T)
            bias = torch.where(past, bias, float("-inf"))
        return bias

    def forward(self, x: Tensor, memory: Tensor | None = None, source_mask: Tensor | None = None) -> Tensor:
        """x (B, T, C); memory (B, S, C); source_mask (B, 1, 1, S), true where a source token may be seen."""
        bias, memory_bias = self.position_bias(x.shape[1]), None  # (1, H, T, T)
        if source_mask is not None and self.decoder:
            memory_bias = source_mask  # (B, 1, 1, S)
        elif source_mask is not None:
            bias = torch.where(source_mask, bias, float("-inf"))  # (B, H, S, S)
        for block in self.blocks:
            x = block(x, bias, memory, memory_bias)
        out: Tensor = self.norm(x)
        return out  # (B, T, C)


class T5(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal, as in Mesh TensorFlow: the queries' deviation makes up for the scores that are not scaled."""
        C, inner = self.config.width, self.config.heads * self.config.head_dim
        deviations = {
            "tokens.weight": 1.0,
            ".q.weight": (C * self.config.head_dim) ** -0.5,
            ".o.weight": inner**-0.5,
            ".down.weight": self.config.ff**-0.5,
        }
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = next((std for end, std in deviations.items() if name.endswith(end)), C**-0.5)
                nn.init.normal_(parameter, std=std)

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for these labels (B, T): pad_id first, the last label dropped, -100 as pad_id."""
        shifted = F.pad(labels, (1, 0), value=self.config.pad_id)[:, :-1]  # (B, T)
        return shifted.masked_fill(shifted == -100, self.config.pad_id)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, S), 0 at padding; `labels`, `decoder_input_ids` (B, T), -100 is ignored.

        The decoder reads `decoder_input_ids`, or else the labels shifted right.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("T5 needs labels or decoder_input_ids")
            decoder_input_ids = self.shift_right(labels)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
        memory = self.encoder(self.tokens(input_ids), source_mask=mask)  # (B, S, C)
        x = self.decoder(self.tokens(decoder_input_ids), memory, mask)  # (B, T, C)
        if self.config.tied:
            x = x * self.config.width**-0.5  # the embedding has deviation 1
        logits = self.head(x)  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.view(-1, self.config.vocab), labels.reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> T5:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return T5(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: T5 | Config,
    batch: int = 12,
    length: int | None = None,
    seed: int = 0,
    padding: bool = False,
) -> dict[str, Tensor]:
    """Random source (B, S = length) and labels (B, T = S/2): row i ignores its last i labels (modulo T).

    With `padding`, an `attention_mask` (B, S) too: row i ends in i tokens (modulo S/2) that no one sees.
    """
    config = model_or_config if isinstance(model_or_config, Config) else model_or_config.config
    S = config.context if length is None else length
    T = max(1, S // 2)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(config.vocab, (batch, S), generator=generator)  # (B, S)
        tokens = torch.randint(config.vocab, (batch, T), generator=generator)  # (B, T)
        ignored = torch.arange(batch)[:, None] % T  # (B, 1)
        labels = tokens.masked_fill(torch.arange(T) >= T - ignored, -100)  # (B, T)
        seen = torch.arange(S) < S - ignored  # (B, S)
    inputs = {"input_ids": input_ids, "labels": labels}
    return inputs | {"attention_mask": seen.long()} if padding else inputs
