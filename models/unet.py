"""The U-Net of denoising diffusion (Ho et al. 2020, arXiv:2006.11239): it predicts the noise in an image.

Residual blocks of group norm, SiLU and convolution, told the time step; attention at some levels; skip connections
from each block on the way down to one on the way up.

Sizes in the shape comments: B batch, W channels, I image side (of the level at hand), T width of the time embedding.
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
    """Level i has `depth` blocks of `widths[i]` channels, which `groups` divides, and, after the first, half the side.

    `attention` are the levels whose blocks are followed by attention of `heads` heads. `steps` of diffusion.
    """

    image: int
    widths: tuple[int, ...]
    depth: int
    attention: tuple[int, ...]
    heads: int
    groups: int
    steps: int = 1000
    channels: int = 3


PRESETS: dict[str, Config] = {
    "tiny": Config(image=12, widths=(24, 48), depth=1, attention=(1,), heads=12, groups=12, steps=100),
    "ddpm_cifar10": Config(image=32, widths=(128, 256, 256, 256), depth=2, attention=(1,), heads=1, groups=32),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut; the time is added between them."""

    def __init__(self, before: int, after: int, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, before)
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, padding=1)
        self.time = nn.Linear(4 * config.widths[0], after)
        self.norm2 = nn.GroupNorm(config.groups, after)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, kernel_size=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, before, I, I), (B, T) -> (B, after, I, I)."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)
        return out


class Attention(nn.Module):
    """Self-attention between the positions of an image."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        """(B, W, I, I) -> (B, W, I, I)."""
        x = self.norm(image).flatten(2).transpose(1, 2)  # (B, II, W)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, II, W)
        out: Tensor = self.o(y)
        return image + out.transpose(1, 2).reshape(image.shape)


class Step(nn.Module):
    """A block, with attention after it if there is one."""

    def __init__(self, before: int, after: int, level: int, config: Config) -> None:
        super().__init__()
        self.block = Block(before, after, config)
        self.attention = Attention(after, config) if level in config.attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, time))
        return out


class Unet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        self.time = nn.Sequential(nn.Linear(first, 4 * first), nn.SiLU(), nn.Linear(4 * first, 4 * first))
        self.stem = nn.Conv2d(config.channels, first, kernel_size=3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        widths, width = [first], first
        for level, after in enumerate(config.widths):
            for _ in range(config.depth):
                self.down.append(Step(width, after, level, config))
                widths.append(width := after)
            if level < len(config.widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1))
                widths.append(width)
        self.middle1, self.middle2 = Block(last, last, config), Block(last, last, config)
        self.middle_attention = Attention(last, config)
        for level, after in reversed(list(enumerate(config.widths))):
            for _ in range(config.depth + 1):
                self.up.append(Step(width + widths.pop(), after, level, config))
                width = after
            if level > 0:
                self.grow.append(nn.Conv2d(width, width, kernel_size=3, padding=1))
        self.norm = nn.GroupNorm(config.groups, first)
        self.head = nn.Conv2d(first, config.channels, kernel_size=3, padding=1)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Noisy `images` (B, channels, I, I) at steps `times` (B); `labels`, the noise in them, of the same shape."""
        half = self.config.widths[0] // 2
        rates = torch.exp(torch.arange(half, device=images.device) * (-math.log(10000) / (half - 1)))  # (W/2)
        angles = times[:, None] * rates  # (B, W/2)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(images.dtype))  # (B, T)
        x = self.stem(images)
        skips, halves, doubles = [x], iter(self.shrink), iter(self.grow)
        for i, step in enumerate(self.down, start=1):
            skips.append(x := step(x, time))
            if i % self.config.depth == 0 and i < len(self.down):
                skips.append(x := next(halves)(x))
        x = self.middle2(self.middle_attention(self.middle1(x, time)), time)
        for i, step in enumerate(self.up, start=1):
            x = step(torch.cat([x, skips.pop()], dim=1), time)
            if i % (self.config.depth + 1) == 0 and i < len(self.up):
                x = next(doubles)(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        logits = self.head(F.silu(self.norm(x)))  # (B, channels, I, I)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.mse_loss(logits, labels), "logits": logits}


def noisy(images: Tensor, noise: Tensor, times: Tensor, steps: int) -> Tensor:
    """Images (B, ...) after steps `times` (B) of a diffusion of `steps` steps (section 4 of the paper)."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), dim=0)[times]  # (B)
    kept = kept.to(images.dtype).reshape(-1, *[1] * (images.dim() - 1))  # (B, 1, 1, 1)
    return kept.sqrt() * images + (1 - kept).sqrt() * noise


def build(preset: str = "tiny", **overrides: Any) -> Unet:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return Unet(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: Unet | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random noisy images, their noise (B, channels, I, I) and time steps (B); I is `length`, or the one of the Config.

    Images and noise have the dtype of the model, or the default dtype when a Config is given.
    """
    if isinstance(model_or_config, Config):
        config, dtype = model_or_config, torch.get_default_dtype()
    else:
        config, dtype = model_or_config.config, model_or_config.head.weight.dtype
    side = config.image if length is None else length
    shape = (batch, config.channels, side, side)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        images, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        times = torch.randint(config.steps, (batch,), generator=generator)  # (B)
        images = noisy(images, noise, times, config.steps)
    return {"images": images, "times": times, "labels": noise}
