"""Mixtral: a Llama-like decoder whose MLP is a routed mixture of experts (Jiang et al. 2024, arXiv:2401.04088).

The experts are written densely: every token goes through every expert, and an (N, E) matrix of routing weights, zero
for the experts a token did not choose, combines the results. This equals the sparse form exactly and keeps every
shape static, at E / top_k times its arithmetic.
Load balancing: Fedus et al. 2021, arXiv:2101.03961, eq. 4.

Sizes in the shape comments: B batch, T tokens, N = B * T, C width, H heads, K key-value heads, D = C / H,
E experts, f width inside an expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """`heads` is a multiple of `kv_heads`; `context` is only the default length of an example batch.

    `balance` weighs the load-balancing loss (summed over layers) in the total loss; 0 leaves it out.
    """

    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ff: int
    experts: int
    top_k: int = 2
    balance: float = 0.0
    rope_theta: float = 1_000_000.0
    eps: float = 1e-5


PRESETS: dict[str, Config] = {
    "tiny": Config(vocab=96, context=24, width=96, layers=2, heads=24, kv_heads=12, ff=48, experts=12),
    "mixtral_8x7b": Config(
        vocab=32000, context=4096, width=4096, layers=32, heads=32, kv_heads=8, ff=14336, experts=8, balance=0.02
    ),
}


def rotary_tables(x: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D) for x (B, T, C): angles in float32 or better, results in the dtype of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.arange(0, head_dim, 2, device=x.device, dtype=dtype)  # (D/2)
    positions = torch.arange(x.shape[1], device=x.device, dtype=dtype)  # (T)
    angles = torch.outer(positions, torch.pow(theta, -pairs / head_dim))  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, D)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its angle."""
    left, right = x.chunk(2, dim=-1)  # each (B, H, T, D/2)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """(B, K, T, D) -> (B, K * groups, T, D): every key-value head serves `groups` query heads in a row."""
    B, K, T, D = x.shape
    return x[:, :, None].expand(B, K, groups, T, D).reshape(B, K * groups, T, D)


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        self.groups = config.heads // config.kv_heads
        self.q = nn.Linear(config.width, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(config.heads * self.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q = rotate(self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, K, T, D)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        k, v = repeat_heads(k, self.groups), repeat_heads(v, self.groups)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        out: Tensor = self.o(y.transpose(1, 2).reshape(B, T, C))
        return out  # (B, T, C)


class Experts(nn.Module):
    """E SwiGLU experts with stacked weights, each applied to every token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.experts, config.width, config.ff))
        self.up = nn.Parameter(torch.empty(config.experts, config.width, config.ff))
        self.down = nn.Parameter(torch.empty(config.experts, config.ff, config.width))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C) and routing weights (N, E) -> (N, C)."""
        gate = torch.einsum("nc,ecf->enf", x, self.gate)  # (E, N, f)
        up = torch.einsum("nc,ecf->enf", x, self.up)  # (E, N, f)
        y = torch.einsum("enf,efc->enc", F.silu(gate) * up, self.down)  # (E, N, C)
        return torch.einsum("ne,enc->nc", weights, y)  # (N, C)


class MoE(nn.Module):
    """Send each token to its top_k experts, weighted by their renormalised router probabilities."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> y (B, T, C) and the load-balancing loss ()."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        probabilities = self.router(flat).softmax(dim=-1)  # (N, E)
        top, index = probabilities.topk(self.top_k, dim=-1)  # each (N, top_k)
        weights = torch.zeros_like(probabilities).scatter(1, index, top / top.sum(dim=-1, keepdim=True))  # (N, E)
        y = self.experts(flat, weights)  # (N, C)
        return y.view(x.shape), balance_loss(probabilities, weights, self.top_k)


def balance_loss(probabilities: Tensor, weights: Tensor, top_k: int) -> Tensor:
    """E * sum over experts of (share of choices) * (mean probability), from two (N, E) matrices; 1 when balanced."""
    share = (weights > 0).to(probabilities.dtype).mean(dim=0) / top_k  # (E)
    return probabilities.shape[1] * (share * probabilities.mean(dim=0)).sum()


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.attn = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.moe = MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        y, balance = self.moe(self.moe_norm(x))
        return x + y, balance  # (B, T, C), ()


class Mixtral(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02); what writes into the residual stream is smaller by sqrt(number of writers)."""
        for name, parameter in self.named_parameters():
            if name.endswith((".o.weight", ".down")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, T); label t is predicted from the tokens before t, -100 is ignored."""
        x = self.tokens(input_ids)  # (B, T, C)
        cos, sin = rotary_tables(x, self.config.width // self.config.heads, self.config.rope_theta)  # (T, D)
        balance = x.new_zeros(())
        for block in self.blocks:
            x, block_balance = block(x, cos, sin)
            balance = balance + block_balance
        logits = self.head(self.norm(x))  # (B, T, V)
        if labels is None:
            return {"logits": logits}
        loss = next_token_loss(logits, labels)
        if self.config.balance:
            loss = loss + self.config.balance * balance
        return {"loss": loss, "logits": logits}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored.

    The labels move rather than the logits: T stays whole, and the large tensor is not copied.
    """
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, T)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-100)


def build(preset: str = "tiny", **overrides: Any) -> Mixtral:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return Mixtral(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: Mixtral | Config, batch: int = 12, length: int | None = None, seed: int = 0
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
