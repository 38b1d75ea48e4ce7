"""Models whose step was once silently wrong, each with the reason for which it was: see ``mutations_cases``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Scheduled(nn.Module):
    """A temperature that a script changes, batch norm that it may freeze, a hook that it registers late."""

    def __init__(self, temperature: float = 0.5, frozen: bool = True, hooked: bool = True) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.temperature = temperature
        if frozen:
            self.norm.eval()
        if hooked:
            self.up.register_forward_hook(lambda module, args, out: 2 * out)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.norm(self.up(x)).relu()
        return functional.cross_entropy(self.head(h) / self.temperature, labels)


class Hooked(nn.Module):
    """Its gradients are scaled within forward, by a hook that no trace has."""

    def __init__(self, hooked: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.hooked = nn.Linear(8, 8), nn.Linear(8, 4), hooked

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.up(x)
        if self.hooked and h.requires_grad:
            h.grad_fn.register_prehook(lambda grads: (0.1 * grads[0],))
        return functional.cross_entropy(self.down(h.relu()), labels)


class Scratch(nn.Module):
    """What is shifted in place is a copy; the value itself is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        shifted = h - h.amax(-1, keepdim=True)
        return self.b(h * (shifted + 1.0).clamp(min=0)).square().mean()


class Cell(nn.Module):
    """A recurrent cell in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cell, self.head = nn.Embedding(12, 8), nn.LSTMCell(8, 8), nn.Linear(8, 12)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        h = c = self.head.weight.new_zeros(tokens.shape[0], 8)
        found = []
        for step in self.tokens(tokens).unbind(1):
            h, c = self.cell(step, (h, c))
            found.append(h)
        return functional.cross_entropy(self.head(torch.stack(found, 1)).flatten(0, 1), labels.flatten())


class Noisy(nn.Module):
    """Noise that all ranks of a tensor-parallel group have to draw alike."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + torch.randn_like(x)
        return (self.down(self.up(h).tanh()) - h).square().mean()


class Contrasted(nn.Module):
    """In-batch negatives: the loss compares all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(y).t()
        return functional.cross_entropy(scores, torch.arange(len(x)))


class Masked(nn.Module):
    """A mean over tokens whose count is clamped, as in scripts of fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        losses = self.down(self.up(x).tanh()).squeeze(-1).square()
        return (losses * mask).sum() / mask.sum().clamp(min=1)


class Reporting(nn.Module):
    """Outputs beside the loss, of which one has its rows in its second dim and one is another mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.b(self.a(x).tanh())
        return {"loss": y.square().mean(), "size": y.abs().mean(), "turned": y.transpose(0, 1)}


class UnevenHead(nn.Module):
    """A vocabulary that two ranks cannot share evenly, and logits that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 7)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.embed(tokens)))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss + 0.1 * logits.logsumexp(-1).square().mean()


class Grouped(nn.Module):
    """Group norm, whose kernel reads weight and bias as if they lay side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).pow(3).mean()


class FewKeys(nn.Module):
    """One weight for queries, and for keys and values of which there are fewer heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 16 + 8 + 8), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).split([16, 8, 8], dim=-1)
        q, k, v = (part.view(rows, length, -1, 4).transpose(1, 2) for part in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, 16)).square().mean()
