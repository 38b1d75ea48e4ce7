"""A model with every form in which people fuse weights: a rank's rows of each are no neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEAD, GROUPS = 16, 4, 2


class Columns(nn.Module):
    """gpt2's Conv1D: a linear whose weight has the outputs along its second dim."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / 4), nn.Parameter(torch.randn(out) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attend(nn.Module):
    """Attention with one projection for queries, keys and values, fused by ``form``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        out = WIDTH * 3 if form in ("thirds", "heads") else WIDTH + 2 * GROUPS * HEAD
        self.fused: nn.Module = Columns(out, WIDTH) if form == "thirds" else nn.Linear(WIDTH, out)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def parts(self, x: Tensor) -> list[Tensor]:
        """q, k, v: (rows, positions, their heads, HEAD)."""
        fused, lead = self.fused(x), x.shape[:2]
        if self.form == "thirds":  # q | k | v, as gpt2
            return [part.view(*lead, -1, HEAD) for part in fused.chunk(3, -1)]
        if self.form == "segments":  # q | fewer k | fewer v, as phi3 and chatglm
            sizes = (WIDTH, GROUPS * HEAD, GROUPS * HEAD)
            return [part.view(*lead, -1, HEAD) for part in fused.split(sizes, -1)]
        if self.form == "heads":  # (q k v) of each head, as gpt_neox
            return list(fused.view(*lead, -1, 3, HEAD).unbind(3))
        per_group = fused.view(*lead, GROUPS, -1, HEAD)  # (q q k v) of each group, as falcon
        q, k, v = per_group[:, :, :, :-2], per_group[:, :, :, -2:-1], per_group[:, :, :, -1:]
        return [part.flatten(2, 3) for part in (q, k, v)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(found.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """gate | up in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Fused(nn.Module):
    """One layer of each form; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, WIDTH)
        self.layers = nn.ModuleList([*map(Attend, ("thirds", "segments", "heads", "groups")), Gated()])
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(number: int, rows: int = 4) -> dict[str, Tensor]:
    """ids and labels, (rows, 6) each."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randint(12, (rows, 6), generator=generator) for name in ("ids", "labels")}
