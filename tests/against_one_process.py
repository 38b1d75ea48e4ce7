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
    expected = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    return {
        f"grad {name}": float((whole(p.grad) - expected[name].grad).abs().max()) / largest for name, p in found.items()
    }


def worst(errors: Errors) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())
