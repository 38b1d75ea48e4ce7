"""Small models whose numbers depend on sizes otherwise than as a product of them: n - 1, square roots, logarithms, sums
of sizes, numbers of pairs, positions.

Each takes ``x`` of [rows, tokens, width] and gives a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY_RATIO = 3  # words for an element of width


class Sized(nn.Module):
    """One model: ``body`` gives a loss from the rows, which two linears have turned, and the module."""

    def __init__(self, body: Callable[[Sized, Tensor], Tensor], width: int, tokens: int, heads: int = 4) -> None:
        super().__init__()
        self.body, self.width, self.tokens = body, width, tokens
        self.words, self.heads = VOCABULARY_RATIO * width, heads
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, self.words)
        self.places = nn.Embedding(tokens + 4, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x + self.down(torch.tanh(self.up(x))))

    def labels(self, x: Tensor) -> Tensor:
        """A word for each token, which no weight decides."""
        return (torch.arange(x.shape[1]) * 5 % self.words).expand(x.shape[0], -1).reshape(-1)

    def split(self, x: Tensor) -> Tensor:
        """[rows, heads, tokens, width of a head]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


MODELS: dict[str, Callable[[Sized, Tensor], Tensor]] = {}


def model(body: Callable[[Sized, Tensor], Tensor]) -> Callable[[Sized, Tensor], Tensor]:
    MODELS[body.__name__] = body
    return body


# ---------------------------------------------------------------- moments


@model
def unbiased_variance_of_a_row(m: Sized, x: Tensor) -> Tensor:
    return (x.var(-1) + 1).sqrt().mean()


@model
def unbiased_variance_of_the_batch(m: Sized, x: Tensor) -> Tensor:
    return (1 - (x.mean(1).var(0) + 1e-4).sqrt()).relu().mean()


@model
def deviation_over_rows_and_tokens(m: Sized, x: Tensor) -> Tensor:
    return ((x - x.mean((0, 1))) / (x.std((0, 1)) + 0.1)).tanh().square().mean()


@model
def covariance_of_the_batch(m: Sized, x: Tensor) -> Tensor:
    """VICReg: divided by rows - 1, what is off the diagonal by the width."""
    h = x.mean(1)
    h = h - h.mean(0)
    c = h.T @ h / (len(h) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / m.width


@model
def cross_correlation(m: Sized, x: Tensor) -> Tensor:
    """Barlow twins."""
    a, b = x[:, 0], x[:, 1]
    a, b = (a - a.mean(0)) / (a.std(0) + 1e-3), (b - b.mean(0)) / (b.std(0) + 1e-3)
    c = a.T @ b / len(a)
    return (c - torch.eye(m.width)).square().sum() / (m.width * (m.width - 1))


# ---------------------------------------------------------------- pairs and sums of sizes


@model
def mean_over_pairs(m: Sized, x: Tensor) -> Tensor:
    h = F.normalize(x.mean(1), dim=-1)
    s = h @ h.T
    n = len(h)
    return s.exp().masked_fill(torch.eye(n, dtype=torch.bool), 0.0).sum() / (n * (n - 1))


@model
def contrastive(m: Sized, x: Tensor) -> Tensor:
    a, b = F.normalize(x[:, 0], dim=-1), F.normalize(x[:, 1], dim=-1)
    return F.cross_entropy(a @ b.T / 0.07, torch.arange(len(a))) + math.log(len(a))


@model
def mean_over_what_is_not_padding(m: Sized, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.square().sum() / (b * s - 3)


@model
def sum_of_sizes(m: Sized, x: Tensor) -> Tensor:
    b, s, d = x.shape
    return x.square().sum() / (b + s + d) * 0.1


@model
def total_variation(m: Sized, x: Tensor) -> Tensor:
    b, s, d = x.shape
    return (x[:, 1:] - x[:, :-1]).abs().sum() / (b * (s - 1) * d)


@model
def triangle_of_weights(m: Sized, x: Tensor) -> Tensor:
    s = x.shape[1]
    weights = 2 * torch.arange(1, s + 1) / (s * (s + 1))
    return (x.square().mean(-1) * weights).sum(1).mean()


@model
def causal_pairs(m: Sized, x: Tensor) -> Tensor:
    s = x.shape[1]
    scores = (x @ x.mT / math.sqrt(m.width)).tril().tanh()
    return scores.square().sum() / (len(x) * s * (s + 1) / 2)


# ---------------------------------------------------------------- roots, logarithms, schedules


@model
def embedding_times_root_of_width(m: Sized, x: Tensor) -> Tensor:
    return m.norm(x * math.sqrt(m.width) + m.places(torch.arange(x.shape[1]) + 2)).tanh().square().mean()


@model
def residual_of_depth(m: Sized, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + m.down(torch.tanh(m.up(x))) / math.sqrt(2 * m.width / 6)
    return x.square().mean()


@model
def entropy_over_its_most(m: Sized, x: Tensor) -> Tensor:
    p = m.head(x).softmax(-1)
    return -(p * (p + 1e-6).log()).sum(-1).mean() / math.log(m.words)


@model
def scale_of_long_contexts(m: Sized, x: Tensor) -> Tensor:
    """Scores times log(tokens) / log(width), as for lengths beyond those of training."""
    q = m.split(x)
    scale = math.log(x.shape[1] + 1) / math.log(m.width) / math.sqrt(q.shape[-1])
    return F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale).tanh().square().mean()


@model
def rotary_of_a_length(m: Sized, x: Tensor) -> Tensor:
    """NTK: the base grows with tokens; attention is scaled by 0.1 log(s) + 1 (YaRN)."""
    q = m.split(x)
    d, s = q.shape[-1], x.shape[1]
    base = 10000.0 * (s / 4) ** (d / (d - 2 + 1e-3))
    angles = torch.arange(s)[:, None] / base ** (torch.arange(0, d, 2) / d)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    q = (q * cos + torch.cat((-q[..., d // 2 :], q[..., : d // 2]), -1) * sin) * (0.1 * math.log(s) + 1)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).tanh().square().mean()


@model
def cosine_of_a_length(m: Sized, x: Tensor) -> Tensor:
    return x.square().mean() * (0.5 + 0.5 * math.cos(math.pi * x.shape[1] / (3 * x.shape[1] + 1)))


@model
def power_of_the_batch(m: Sized, x: Tensor) -> Tensor:
    b, s, d = x.shape
    return x.square().sum() * (b * s) ** -0.75 * d**-1.25


# ---------------------------------------------------------------- attention and positions


@model
def alibi(m: Sized, x: Tensor) -> Tensor:
    q, s = m.split(x), x.shape[1]
    slopes = torch.tensor([2 ** (-8 * (n + 1) / m.heads) for n in range(m.heads)])
    bias = slopes[:, None, None] * (torch.arange(s)[None, :] - torch.arange(s)[:, None])
    bias = bias.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).tanh().square().mean()


@model
def positions_that_begin_at_two(m: Sized, x: Tensor) -> Tensor:
    return m.norm(x + m.places(torch.arange(2, x.shape[1] + 2))).tanh().square().mean()


@model
def positions_from_the_end(m: Sized, x: Tensor) -> Tensor:
    return m.norm(x + m.places(x.shape[1] - 1 - torch.arange(x.shape[1]))).tanh().square().mean()


@model
def discount_of_positions(m: Sized, x: Tensor) -> Tensor:
    s = x.shape[1]
    return (x.square().mean(-1) * 0.9 ** torch.arange(s)).sum(1).mean() * (1 - 0.9) / (1 - 0.9**s)


@model
def running_mean(m: Sized, x: Tensor) -> Tensor:
    return (x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]).tanh().square().mean()


# ---------------------------------------------------------------- losses


@model
def smoothed_labels(m: Sized, x: Tensor) -> Tensor:
    return F.cross_entropy(m.head(x).flatten(0, 1), m.labels(x), label_smoothing=0.1)


@model
def smoothed_labels_by_hand(m: Sized, x: Tensor) -> Tensor:
    logs = m.head(x).flatten(0, 1).log_softmax(-1)
    right = logs.gather(1, m.labels(x)[:, None]).squeeze(1)
    return -(0.9 * right + 0.1 / (m.words - 1) * (logs.sum(-1) - right)).mean()


@model
def batch_mean_of_a_divergence(m: Sized, x: Tensor) -> Tensor:
    logs = m.head(x.mean(1)).log_softmax(-1)
    return F.kl_div(logs, torch.full_like(logs, 1 / m.words), reduction="batchmean")


@model
def huber_of_the_width(m: Sized, x: Tensor) -> Tensor:
    return F.smooth_l1_loss(x, torch.zeros_like(x), beta=1 / (m.width + 1))


@model
def balance_of_a_router(m: Sized, x: Tensor) -> Tensor:
    """Switch: the experts' shares of tokens times their mean chances, times how many there are."""
    p = m.head(x).flatten(0, 1).softmax(-1)
    share = F.one_hot(p.argmax(-1), m.words).float().mean(0)
    return m.words * (share * p.mean(0)).sum() + 1e-3 * p.log().logsumexp(-1).square().mean()


@model
def most_of_a_quarter(m: Sized, x: Tensor) -> Tensor:
    k = x.shape[1] // 4 + 1
    return x.square().mean(-1).topk(k, 1).values.sum() / (len(x) * k + 1)


@model
def windows(m: Sized, x: Tensor) -> Tensor:
    s = x.shape[1]
    return F.avg_pool1d(x.mT, 3, 1).square().sum() / (len(x) * (s - 3 + 1) * m.width)


@model
def overlap(m: Sized, x: Tensor) -> Tensor:
    """Dice."""
    p = x.sigmoid().flatten(1)
    return (1 - (2 * p.square().sum(1) + 1) / (p.sum(1) + p.shape[1] + 1)).mean()


@model
def grouped_norm(m: Sized, x: Tensor) -> Tensor:
    return (F.group_norm(x.mT, 2) * m.norm.weight[:, None]).tanh().square().mean()
