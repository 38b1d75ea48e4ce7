"""Mixtures of experts as people write them: a loop over a list of experts, in many spellings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, EXPERTS, CHOICES = 8, 12, 4, 2


class Plain(nn.Sequential):
    """Two layers with biases."""

    def __init__(self, inner: int = INNER) -> None:
        super().__init__(nn.Linear(WIDTH, inner), nn.SiLU(), nn.Linear(inner, WIDTH))


class Gated(nn.Module):
    """Mixtral's: w2(silu(w1(x)) * w3(x)), without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Chunked(nn.Module):
    """A norm with weights of its own, one layer for both halves, a scale for each column, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(self.norm(x)).chunk(2, -1)
        heads = (left.sigmoid() * right).view(-1, 2, WIDTH // 2).softmax(-1)
        return x + self.scale * heads.reshape(-1, WIDTH)


class Matrices(nn.Module):
    """Bare parameters, stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(INNER, WIDTH) / 3), nn.Parameter(torch.randn(INNER, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.t()) @ self.down


Loop = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


def where(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = torch.where(chosen == number)
        out[token] += weights[token, place, None] * expert(x[token])
    return out


def index_add(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = torch.where(chosen == number)
        out = out.index_add(0, token, weights[token, place, None] * expert(x[token]))
    return out


def nonzero(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        found = (chosen == number).nonzero()
        token, place = found[:, 0], found[:, 1]
        out.index_put_((token,), expert(x[token]) * weights[token, place].unsqueeze(1), accumulate=True)
    return out


def mixtral(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    mask = F.one_hot(chosen, num_classes=len(experts)).permute(2, 1, 0)
    out = torch.zeros((len(x), x.shape[-1]), dtype=x.dtype, device=x.device)
    for number in range(len(experts)):
        place, token = torch.where(mask[number])
        state = x[None, token].reshape(-1, x.shape[-1])
        state = experts[number](state) * weights[token, place, None]
        out.index_add_(0, token, state.to(x.dtype))
    return out


def litgpt(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    masks = chosen.unsqueeze(-1) == torch.arange(len(experts), device=x.device)
    y = torch.zeros_like(x)
    for mask, expert in zip(masks.permute(2, 0, 1), experts):
        token, place = torch.where(mask)
        y[token] += weights[token, place, None] * expert(x[token])
    return y


def tokens_of_mask(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = (chosen == number).any(dim=-1)
        weight = (weights * (chosen == number)).sum(-1)
        out[mask] += weight[mask].unsqueeze(-1) * expert(x[mask])
    return out


def dense(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.as_tensor(
        sum((weights * (chosen == number)).sum(-1, keepdim=True) * expert(x) for number, expert in enumerate(experts))
    )


LOOPS: tuple[Loop, ...] = (where, index_add, nonzero, mixtral, litgpt, tokens_of_mask, dense)


class Mixture(nn.Module):
    """A router and a loop over experts. ``unused``: no row chooses the last expert."""

    def __init__(
        self,
        loop: Loop = where,
        expert: Callable[[], nn.Module] = Plain,
        choices: int = CHOICES,
        unused: bool = False,
        experts: int = EXPERTS,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))
        self.loop, self.choices, self.unused = loop, choices, unused

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        scores = self.gate(rows)
        if self.unused:
            scores = scores - 50.0 * torch.tensor([0.0] * (len(self.experts) - 1) + [1.0])
        weights, chosen = torch.topk(scores.softmax(-1), self.choices)
        mixed = self.loop(self.experts, rows, weights, chosen)
        return (mixed + rows).reshape(x.shape).square().mean()
