"""DLRM: a recommendation model of embedding tables, interactions and two MLPs (Naumov et al. 2019, arXiv:1906.00091).

Each sparse feature has a table. One that names a single row is an ``nn.Embedding``; one that names several is an
``nn.EmbeddingBag``, with as many rows for every example, or, ragged, with offsets of where each bag begins.

Sizes in the shape comments: B batch, E embedding, F features (tables and one dense), L rows of a bag, N of all bags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """`rows` and `bags`, one entry for each table: its rows, and how many of them an example names (1: no bag).

    `bottom` and `top` are the hidden sizes of the MLPs; `mode` is how bags are pooled ("sum", "mean", "max").
    """

    dense: int
    rows: tuple[int, ...]
    bags: tuple[int, ...]
    width: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    mode: str = "sum"
    ragged: bool = False


_CRITEO_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "tiny": Config(
        dense=12, rows=(96, 240, 144, 60, 48, 36, 24, 12), bags=(1, 4, 6, 1, 3, 1, 2, 1),
        width=24, bottom=(48,), top=(48, 24),
    ),
    "criteo_kaggle": Config(
        dense=13, rows=_CRITEO_ROWS, bags=(1,) * 26, width=16, bottom=(512, 256, 64), top=(512, 256)
    ),
}  # fmt: skip


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Dlrm(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.ModuleList()
        for rows, bag in zip(config.rows, config.bags, strict=True):
            if bag == 1:
                self.tables.append(nn.Embedding(rows, config.width))
            else:
                self.tables.append(nn.EmbeddingBag(rows, config.width, mode=config.mode))
        features = len(config.rows) + 1
        pairs = features * (features - 1) // 2
        self.bottom = mlp((config.dense, *config.bottom, config.width))
        self.top = mlp((config.width + pairs, *config.top, 1))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Tables uniform in +-1/sqrt(rows), as the paper's code has them."""
        for rows, table in zip(self.config.rows, self.tables, strict=True):
            nn.init.uniform_(table.get_parameter("weight"), -(rows**-0.5), rows**-0.5)

    def forward(
        self,
        dense: Tensor,
        sparse: list[Tensor],
        offsets: list[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`dense` (B, dense); `sparse`: for each table (B), (B, L) or ragged (N); `labels` (B), 0 or 1.

        `offsets`, of a ragged model: (B) for each bag table, where each example's rows begin.
        """
        begins = iter(offsets or ())
        vectors = [F.relu(self.bottom(dense))]  # (B, E)
        for table, rows in zip(self.tables, sparse, strict=True):
            if isinstance(table, nn.EmbeddingBag) and self.config.ragged:
                vectors.append(table(rows, next(begins)))  # (B, E)
            else:
                vectors.append(table(rows))  # (B, E)
        features = torch.stack(vectors, dim=1)  # (B, F, E)
        products = features @ features.transpose(1, 2)  # (B, F, F)
        i, j = torch.tril_indices(len(vectors), len(vectors), offset=-1, device=dense.device)
        logits = self.top(torch.cat([vectors[0], products[:, i, j]], dim=1)).squeeze(1)  # (B)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)), "logits": logits}


def build(preset: str = "tiny", **overrides: Any) -> Dlrm:
    """The model of a preset, with fields of its Config replaced by `overrides`."""
    return Dlrm(replace(PRESETS[preset], **overrides))


def example_batch(
    model_or_config: Dlrm | Config, batch: int = 12, length: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Random features and labels; of ragged bags, example i names i rows fewer or more (modulo the usual number).

    `dense` has the dtype of the model, or the default dtype when a Config is given. `length` is not used.
    """
    if isinstance(model_or_config, Config):
        config, dtype = model_or_config, torch.get_default_dtype()
    else:
        config, dtype = model_or_config.config, next(model_or_config.parameters()).dtype
    sparse, offsets = [], []
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(batch, config.dense, generator=generator).to(dtype)  # (B, dense)
        for rows, bag in zip(config.rows, config.bags, strict=True):
            counts = 1 + torch.arange(batch) % (2 * bag - 1)  # (B)
            shape = (batch,) if bag == 1 else (int(counts.sum()),) if config.ragged else (batch, bag)
            sparse.append(torch.randint(rows, shape, generator=generator))
            if config.ragged and bag > 1:
                offsets.append(counts.cumsum(0) - counts)
        labels = torch.randint(2, (batch,), generator=generator)  # (B)
    ragged = {"offsets": offsets} if config.ragged else {}
    return {"dense": dense, "sparse": sparse, **ragged, "labels": labels}
