"""A small model with the traps in it, and how far a parallel module is from the unmodified model beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.module import ParallelModule

Errors = dict[str, float]


class Tiny(nn.Module):
    """Fused thirds, a tied weight, a buffer that changes, an output beside the loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.fused = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight
        self.dropout = dropout

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tokens(ids)
        a, b, c = self.fused(x).chunk(3, dim=-1)
        x = x + self.down(F.dropout(a * torch.tanh(b) + c, self.dropout, self.training))
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def generate(self) -> None:
        """A method that a parallel module does not have."""


class GroupedHeads(nn.Module):
    """One linear for 4 query heads and 2 key and value heads: a rank's part of its weight is no strided shard."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 16)
        self.qkv = nn.Linear(16, 32)
        self.out = nn.Linear(16, 16)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids)
        q, k, v = self.qkv(x).split((16, 8, 8), dim=-1)
        q, k, v = (part.view(*part.shape[:2], -1, 4).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return {"loss": F.cross_entropy((x @ self.tokens.weight.t()).flatten(0, 1), labels.flatten())}


def tiny_batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (rows, 5), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, :3] = -100
    return {"ids": ids, "labels": labels}


def float64(build: Callable[[], nn.Module]) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return build()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def difference(found: Any, expected: Any) -> float:
    found, expected = whole(found), whole(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare_gradients(model: ParallelModule, reference: nn.Module) -> Errors:
    """Errors relative to the model's largest gradient."""
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    found = model.full_grads()
    assert list(found) == list(expected)
    return {f"grad {name}": float((grad - expected[name]).abs().max()) / largest for name, grad in found.items()}


def worst(errors: Errors) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())
