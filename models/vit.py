"""ViT: a transformer encoder over image patches (Dosovitskiy et al. 2020, arXiv:2010.11929).

A convolution cuts the image into patches, a class token is put before them, and the classifier reads that token.
Learned positions, pre-LN blocks, one fused QKV linear read as (3, H, D), exact GELU.

Sizes in the shape comments: B batch, T = 1 + patches, C width, H heads, D = C / H, f MLP, I image side, P patch side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Square images of `image` pixels a side, cut into squares of `patch` pixels."""

    image: int
    patch: int
    width: int
    layers: int
    heads: int
    ff: int
    classes: int
    channels: int = 3
    eps: float = 1e-6


PRESETS: dict[str, Config] = {
    "tiny": Config(image=24, patch=6, width=48, layers=2, heads=12, ff=192, classes=12),
    "vit_base": Config(image=224, patch=16, width=768, layers=12, heads=12, ff=3072, classes=1000),
    "vit_huge": Config(image=224, patch=14, width=1280, layers=32, heads=16, ff=5120, classes=1000),
}


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with one linear for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return out  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.width, eps=config.eps)
        self.fc = nn.Linear(config.width, config.ff)
        self.proj = nn.Linear(config.ff, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        out: Tensor = x + self.proj(F.gelu(self.fc(self.ln2(x))))  # (B, T, C) -> (B, T, f) -> (B, T, C)
        return out


class ViT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        patches = (config.image // config.patch) ** 2
        self.patches = nn.Conv2d(config.channels, config.width, kernel_size=config.patch, stride=config.patch)
        self.cls = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02), residual writers smaller by the root of their number; the patches keep their variance."""
        for name, parameter in self.named_parameters():
            if name == "patches.weight":
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`pixel_values` (B, channels, I, I); `labels` (B), a class each."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, C, I/P, I/P) -> (B, T-1, C)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.positions  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)[:, 0])  # (B, classes)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> ViT:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return ViT(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: ViT | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random images (B, channels, I, I) and classes (B); `length` may only repeat I, which the positions fix.

    The images have the dtype of the model, or the default dtype when a Config is given.
    """
    if isinstance(model_or_config, Config):
        config, dtype = model_or_config, torch.get_default_dtype()
    else:
        config, dtype = model_or_config.config, model_or_config.head.weight.dtype
    if length not in (None, config.image):
        raise ValueError(f"the learned positions fix the image side to {config.image}, not {length}")
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, config.channels, config.image, config.image, generator=generator)
        labels = torch.randint(config.classes, (batch,), generator=generator)  # (B)
    return {"pixel_values": images.to(dtype), "labels": labels}
