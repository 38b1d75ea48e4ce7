"""ResNet: a convolutional network of basic residual blocks with batch norm (He et al. 2015, arXiv:1512.03385).

Sizes in the shape comments: B batch, W channels, I image side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Stage i has `depths[i]` blocks of `widths[i]` channels and, after the first, halves the image side."""

    image: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    classes: int
    channels: int = 3


PRESETS: dict[str, Config] = {
    "tiny": Config(image=24, widths=(12, 24), depths=(1, 1), classes=12),
    "resnet18": Config(image=224, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), classes=1000),
    "resnet34": Config(image=224, widths=(64, 128, 256, 512), depths=(3, 4, 6, 3), classes=1000),
}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, I, I) -> (B, after, I / stride, I / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Conv2d(config.channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList()
        for stage, (after, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for i in range(depth):
                self.blocks.append(Block(width, after, stride=2 if stage > 0 and i == 0 else 1))
                width = after
        self.head = nn.Linear(width, config.classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Kaiming normal convolutions (arXiv:1502.01852); batch norms start as the identity."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            elif name == "head.weight":
                nn.init.normal_(parameter, std=0.02)
            elif name == "head.bias":
                nn.init.zeros_(parameter)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`pixel_values` (B, channels, I, I); `labels` (B), a class each."""
        x = F.relu(self.stem_bn(self.stem(pixel_values)))  # (B, W, I/2, I/2)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # (B, W, I/4, I/4)
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, W)
        logits = self.head(x)  # (B, classes)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> ResNet:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return ResNet(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: ResNet | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random images (B, channels, I, I) and classes (B); I is `length`, or the one of the Config.

    The images have the dtype of the model, or the default dtype when a Config is given.
    """
    if isinstance(model_or_config, Config):
        config, dtype = model_or_config, torch.get_default_dtype()
    else:
        config, dtype = model_or_config.config, model_or_config.head.weight.dtype
    side = config.image if length is None else length
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, config.channels, side, side, generator=generator)
        labels = torch.randint(config.classes, (batch,), generator=generator)  # (B)
    return {"pixel_values": images.to(dtype), "labels": labels}
