"""MLP: a stack of linear, GELU, linear (Rumelhart et al. 1986; GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415).

Sizes in the shape comments: B batch, C width, f width inside a block, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """`width` of the inputs and between blocks; `outputs` counts classes ("cross_entropy") or targets ("mse")."""

    width: int
    ff: int
    layers: int
    outputs: int
    residual: bool = False
    loss: Literal["mse", "cross_entropy"] = "cross_entropy"


PRESETS: dict[str, Config] = {
    "tiny": Config(width=48, ff=192, layers=2, outputs=12),
    "wide": Config(width=1024, ff=16384, layers=4, outputs=1024, residual=True, loss="mse"),
}


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.residual = config.residual
        self.up = nn.Linear(config.width, config.ff)
        self.down = nn.Linear(config.ff, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))  # (B, C) -> (B, f) -> (B, C)
        return x + y if self.residual else y


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.outputs)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal with deviation 1/sqrt(inputs), which keeps the variance; zero biases; residual writers smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
                continue
            std: float = parameter.shape[1] ** -0.5
            writer = self.config.residual and name.endswith("down.weight")
            nn.init.normal_(parameter, std=std / self.config.layers**0.5 if writer else std)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`inputs` (B, C); `labels` (B) classes, -100 is ignored, or (B, O) targets of the squared error."""
        x = inputs
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)  # (B, O)
        if labels is None:
            return {"logits": logits}
        mse = self.config.loss == "mse"
        return {"loss": F.mse_loss(logits, labels) if mse else F.cross_entropy(logits, labels), "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> MLP:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return MLP(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: MLP | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs (B, C) and labels, (B) classes or (B, O) targets; `length` must be None: there is no sequence.

    Floating-point tensors have the dtype of the model, or the default dtype when a Config is given.
    """
    if isinstance(model_or_config, Config):
        config, dtype = model_or_config, torch.get_default_dtype()
    else:
        config, dtype = model_or_config.config, model_or_config.head.weight.dtype
    if length is not None:
        raise ValueError("an MLP has no sequence, so no length")
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(batch, config.width, generator=generator).to(dtype)  # (B, C)
        if config.loss == "mse":
            labels = torch.randn(batch, config.outputs, generator=generator).to(dtype)  # (B, O)
        else:
            labels = torch.randint(config.outputs, (batch,), generator=generator)  # (B)
    return {"inputs": inputs, "labels": labels}
