"""Layers of experts in which every expert runs for every token, as people write them; ``FORMS`` are all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 12, 2, 4, 8, 16


class Layer(nn.Module):
    """A router and gated experts, some with biases; ``mixed`` is what the spellings below differ in."""

    choices = CHOICES

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 4)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        probabilities = logits.softmax(-1)
        top, ids = probabilities.topk(self.choices, -1)
        scattered = torch.zeros_like(probabilities).scatter(-1, ids, top / top.sum(-1, keepdim=True))
        balance = ((scattered > 0).to(x.dtype).mean(0) * probabilities.mean(0)).sum()  # of all tokens and experts
        return self.mixed(x, logits, top, ids, scattered).square().mean() + 0.1 * balance.sum()

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        raise NotImplementedError

    def experts(self, x: Tensor) -> Tensor:
        """(N, C) -> (E, N, C)"""
        hidden = F.silu(torch.einsum("nc,ecf->enf", x, self.gate)) * torch.einsum("nc,ecf->enf", x, self.up)
        return torch.einsum("enf,efc->enc", hidden, self.down)


class Einsum(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered, self.experts(x))


class Expanded(Layer):
    """gpt_oss as its authors wrote it: tokens repeated for each expert, batched products, biases, columns in pairs."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        rows = x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        both = torch.baddbmm(self.up_bias.repeat(1, 2)[:, None, :], rows, torch.cat([self.gate, self.up], -1))
        gate, up = both[..., ::2], both[..., 1::2]
        y = torch.bmm((up.clamp(-1, 1) + 1) * gate * torch.sigmoid(gate), self.down) + self.down_bias[:, None]
        return (y * scattered.transpose(0, 1)[..., None]).sum(0)


class OneHot(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        weights = (F.one_hot(ids, EXPERTS) * top[..., None]).sum(1)
        return (weights.t()[..., None] * self.experts(x)).sum(0)


class OneHotEinsum(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("nke,enc,nk->nc", F.one_hot(ids, EXPERTS).to(x.dtype), self.experts(x), top)


class Selected(Layer):
    """The result of each choice by itself, weighted later."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        chosen = torch.einsum("nke,enc->nkc", F.one_hot(ids, EXPERTS).to(x.dtype), self.experts(x))
        return (chosen * top[..., None]).sum(1)


class Compared(Layer):
    """Ids compared with all numbers, ``matmul`` with an implied dim, biases, a norm over the width in an expert."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        weights = ((ids[..., None] == torch.arange(EXPERTS)) * top[..., None]).sum(1)
        hidden = F.layer_norm(F.gelu(x @ self.up + self.up_bias[:, None]), (INNER,))
        return (weights[:, None, :] @ (hidden @ self.down).transpose(0, 1)).squeeze(1)


class Hidden(Layer):
    """The others at -inf, then a softmax over all experts."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept, chosen = logits.topk(CHOICES, -1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, chosen, kept).softmax(-1)
        return torch.einsum("ne,enc->nc", weights, self.experts(x))


class Masked(Layer):
    """Probabilities times a mask, and normalised over what remains."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept = logits.softmax(-1) * torch.zeros_like(logits).scatter(1, ids, 1.0)
        weights = kept / kept.sum(-1, keepdim=True)
        hidden = torch.einsum("nc,ecf->nef", x, self.up).relu()
        return (torch.einsum("nef,efc->nec", hidden, self.down) * weights[..., None]).sum(1)


class Filled(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        mask = (ids[..., None] == torch.arange(EXPERTS)).any(1)
        weights = logits.sigmoid().masked_fill(~mask, 0.0)
        return torch.einsum("ne,enc->nc", torch.where(mask, weights, 0.0), self.experts(x))


class Scored(Layer):
    """llama4: the score multiplies what an expert takes, and its experts map 0 to 0."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept, chosen = torch.topk(logits, self.choices, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, kept).sigmoid()
        rows = (x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(EXPERTS, -1, WIDTH)
        gate, up = torch.bmm(rows, torch.cat([self.gate, self.up], -1)).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.down).view(-1, WIDTH)
        return x + y.reshape(EXPERTS, -1, WIDTH).sum(dim=0)


class Joined(Layer):
    """One product sums over experts and over their inner width."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        hidden = torch.einsum("nc,ecf->nef", x, self.up).relu() * scattered[..., None]
        return hidden.reshape(-1, EXPERTS * INNER) @ self.down.reshape(EXPERTS * INNER, WIDTH)


class Batched(Layer):
    """Tokens in two dims, and one product of three tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (-1, 2)))

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        hidden = torch.einsum("btc,ecf->btef", x, self.up).tanh()
        return torch.einsum("btef,efc,bte->btc", hidden, self.down, scattered)


class Switch(Layer):
    """One expert for each token, by argmax."""

    choices = 1

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        gates = logits.softmax(-1) * F.one_hot(logits.argmax(-1), EXPERTS)
        return torch.einsum("ne,enc->nc", gates, self.experts(x))


class OneOf(Scored):
    choices = 1


class Looped(Layer):
    """One expert after the other: elements of stacked weights, columns of the routing weights, something before."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        out = x
        for number in range(EXPERTS):
            hidden = F.relu(F.linear(x, self.up[number].t(), self.up_bias[number]))
            out = out + scattered[:, number : number + 1] * (hidden @ self.down[number])
        return out


class Unbound(Layer):
    """Weights taken apart together, and the ids compared with one number at a time."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, (up, down, bias) in enumerate(zip(self.up.unbind(), self.down.unbind(), self.down_bias.unbind())):
            weight = (top * (ids == number)).sum(-1, keepdim=True)
            gate, other = torch.einsum("nc,cf->nf", x, up).chunk(2, dim=-1)
            out = out + weight * ((gate.sigmoid() * other) @ down[: INNER // 2] + bias)
        return out


class Listed(Layer):
    """Modules in a list; their results are stacked, and then weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        results = torch.stack([block(x) for block in self.blocks], dim=1)
        return (results * scattered.unsqueeze(-1)).sum(1)


class ListedAndJoined(Listed):
    """Joined along a dim of size 1; weights put at the place of the chosen experts."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        weights = torch.zeros(len(x), EXPERTS, dtype=x.dtype)
        weights[torch.arange(len(x))[:, None], ids] = top
        results = torch.cat([block(x)[:, None] for block in self.blocks], 1)
        return torch.bmm(weights[:, None], results)[:, 0]


class Normalised(Layer):
    """A norm in an expert, whose size is one number for each token and expert."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        hidden = torch.einsum("nc,ecf->enf", x, self.up)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1) + 1e-6).unsqueeze(-1) * self.up_bias[:, None]
        result = torch.einsum("enf,efc->enc", hidden, self.down)
        mask = F.one_hot(ids, EXPERTS).sum(1).bool().t()[..., None]
        return torch.where(mask, result, torch.zeros_like(result)).sum(0)


class ListedAndAdded(Listed):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return sum((scattered[:, i, None] * block(x) for i, block in enumerate(self.blocks)), x)


FORMS = (
    Einsum, Expanded, OneHot, OneHotEinsum, Selected, Compared, Hidden, Masked, Filled, Scored, Joined, Batched, Switch,
    OneOf, Looped, Unbound, Listed, ListedAndAdded,
    ListedAndJoined, Normalised,
)  # fmt: skip
