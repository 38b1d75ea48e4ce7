"""A small transformer with an end of its own: what a model does along its sequence apart from attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.check import Reference

WIDTH, VOCABULARY, BATCH, LENGTH = 16, 32, 4, 48


class Along(nn.Module):
    """One attention layer, and ``end(model, hidden, labels)``."""

    def __init__(self, end: End, causal: bool) -> None:
        super().__init__()
        self.end, self.causal = end, causal
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.row = nn.Parameter(torch.randn(WIDTH))
        self.taps = nn.Parameter(torch.randn(WIDTH, 1, 4))
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH, 3))
        self.register_buffer("weights", torch.rand(VOCABULARY) + 0.5)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.embedded(ids)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.finished(x + self.out(y.transpose(1, 2).flatten(2)), labels)

    def embedded(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        return found

    def finished(self, h: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.end(self, h, labels)


End = Callable[[Along, Tensor, Tensor], Tensor | tuple[Tensor, ...]]


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    """Rows of unequal lengths, with unequal numbers of labels."""
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5], labels[0, -2:], labels[1, -9:] = -100, -100, -100
    return {"ids": ids, "labels": labels}


@cache
def reference(end: End, causal: bool = True, length: int = LENGTH) -> Reference:
    torch.manual_seed(0)
    return Reference(Along(end, causal).double(), batch(length))


# ---------------------------------------------------------------- losses of the next token


def shifted(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(h)[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def shifted_views(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(h)[..., :-1, :].contiguous().view(-1, VOCABULARY)
    return F.cross_entropy(logits, labels[..., 1:].contiguous().view(-1))


def weighted_smoothed(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(torch.tanh(h[:, :-1])).flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), model.weights, label_smoothing=0.1)


def classes_second(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(h)[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=3), ignore_index=3)


def each_token(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    logits, target = model.head(h)[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.reshape(-1, VOCABULARY), target.reshape(-1), reduction="none").view(target.shape)
    counted = target != -100
    return (losses * counted).sum() / counted.sum()


def summed(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(h)[:, :-1].reshape(-1, VOCABULARY)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")


def from_log_softmax(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    scores = model.head(h)[:, :-1].log_softmax(-1)
    return F.nll_loss(scores.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def picked_scores(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    scores, target = model.head(h)[:, :-1].log_softmax(-1), labels[:, 1:]
    return -(scores.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (target >= 0)).mean()


def two_ahead(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    """Two shifts, one of them after a slice in the middle."""
    middle = model.head(h[:, 1:-1])
    return F.cross_entropy(middle[:, 1:-2].flatten(0, 1), labels[:, 4:-1].flatten())


def reversed_shift(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(h)[:, 1:].reshape(-1, VOCABULARY), labels[:, :-1].reshape(-1))


def with_logits(model: Along, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.head(h)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)), logits


LOSSES: list[End] = [
    shifted, shifted_views, weighted_smoothed, classes_second, each_token, summed, from_log_softmax, picked_scores,
    two_ahead, reversed_shift, with_logits,
]  # fmt: skip


# ---------------------------------------------------------------- windows, shifts and rows


def differences(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    h = model.head(h)
    return (h[:, 1:] * model.weights - h[:, :-1]).square().mean() + h[:, 2:-1].abs().sum() * 0.01


def elementwise_loss(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    h = torch.tanh(model.head(h))
    return F.mse_loss(h[:, :-1], h[:, 1:] * model.weights) + F.smooth_l1_loss(h[:, 1:], h[:, :-1] * model.weights)


def token_shift(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    before = F.pad(h, (0, 0, 1, -1))
    return shifted(model, h * model.row + before * (1 - model.row), labels)


def shift_by_cat(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    before = torch.cat([model.row.expand(len(h), 1, -1), h[:, :-1]], 1)
    return shifted(model, h * before, labels)


def prompt(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    rows = model.row * torch.arange(1, 4, dtype=h.dtype)[:, None]
    return shifted(model, torch.cat([rows.expand(len(h), -1, -1), h[:, :-3]], 1), labels)


def turned(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return shifted(model, h + torch.cat([h[:, 1:], h[:, :1]], 1).tanh() + torch.roll(h, -2, 1), labels)


def first_and_last(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    rows = torch.stack([h[:, 0], h[:, -1], h[:, 1:][:, 4]], 1)
    return F.cross_entropy(model.head(rows).flatten(0, 1), labels[:, 5:8].flatten())


def last_token(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    places = (labels != -100).int().sum(-1) - 1
    return F.cross_entropy(model.head(h)[torch.arange(len(h)), places], labels[:, 5])


def chosen_rows(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return model.head(h.index_select(1, torch.tensor([3, 1, 0, 5]))).square().mean() + h[:, [2, 7]].sum()


SHIFTS: list[End] = [
    differences, elementwise_loss, token_shift, shift_by_cat, prompt, turned, first_and_last, last_token, chosen_rows,
]  # fmt: skip


# ---------------------------------------------------------------- convolutions and scans


def _beside(model: Along, h: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    return shifted(model, h + found.transpose(1, 2).tanh(), labels)


def causal(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    """As mamba has it: padded at both ends, then cut."""
    found = F.conv1d(h.transpose(1, 2), model.taps, padding=3, groups=WIDTH)[..., : h.shape[1]]
    return _beside(model, h, labels, found)


def padded_in_front(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return _beside(model, h, labels, F.conv1d(F.pad(h.transpose(1, 2), (3, 0)), model.taps, groups=WIDTH))


def centred(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return _beside(model, h, labels, F.conv1d(h.transpose(1, 2), model.square, model.row, padding=1))


def dilated(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return _beside(model, h, labels, F.conv1d(h.transpose(1, 2), model.square, padding="same", dilation=2))


def two_dims(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    found = F.conv2d(h.unsqueeze(1), model.square[:1, :1].unsqueeze(-1), padding=(1, 0)).squeeze(1)
    return shifted(model, h + found, labels)


def shorter(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return model.head(F.conv1d(h.transpose(1, 2), model.square).transpose(1, 2)).square().mean()


def strided(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    return model.head(F.conv1d(h.transpose(1, 2), model.square, stride=2, padding=1).transpose(1, 2)).square().mean()


def twice(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    for _ in range(2):
        h = h + F.conv1d(h.transpose(1, 2), model.taps, padding=3, groups=WIDTH)[..., :-3].transpose(1, 2).tanh()
    return shifted(model, h, labels)


def scans(model: Along, h: Tensor, labels: Tensor) -> Tensor:
    products = (0.01 * h).exp().cumprod(1)
    return shifted(model, h + 0.1 * h.cumsum(1) + products + h.logcumsumexp(1), labels)


CONVOLUTIONS: list[End] = [causal, padded_in_front, centred, dilated, two_dims, shorter, strided, twice, scans]
ENDS = {end.__name__: end for end in (*LOSSES, *SHIFTS, *CONVOLUTIONS)}
