"""Models in which no token meets another, and a pass that splits dim 1 of their inputs over ``sp``, whatever is there.

with tokens_split():
    report = check(TokenWise(), batch, Mesh(dp=2, sp=2), Plan(zero=3))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar import compiler
from autopar.ir.graph_pass import graph_pass
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.passes import COMPILER
from autopar.passes.split_sequence import split_sequence
from autopar.split.batch_policy import BatchPolicy
from autopar.split.split_axis import split_axis


def token_batch(rows: int = 12, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Labels of which some, on some ranks more than on others, do not count."""
    ids = torch.randint(0, 12, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[0, :5] = labels[-1, -2:] = -100
    return {"ids": ids, "labels": labels}


@contextmanager
def tokens_split(*only: str) -> Iterator[None]:
    """The compiler with, for ``split_sequence``, a pass that splits dim 1 of the inputs called so (default: all)."""

    @graph_pass()
    def split_tokens(program: Program) -> Program:
        inputs = [n.name for n, entry in program.placeholders(InputKind.INPUT) if not only or entry.target in only]
        dims = dict.fromkeys(inputs, 1)
        return split_axis(program, BatchPolicy("sp", dims, dims))

    phases = []
    for phase in COMPILER:
        passes = tuple(split_tokens if step is split_sequence else step for step in phase.passes)
        phases.append(replace(phase, passes=passes))
    with mock.patch.object(compiler, "COMPILER", tuple(phases)):
        yield


class OddTokens(nn.Module):
    """Sizes that nothing divides, among them 5 (in four parts 2, 2, 1 and 0), a scalar, a vector of two, a tied,
    an unused and a frozen parameter; of one the gradient is alike on all ranks of ``sp``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(12, 7), nn.Linear(7, 13), nn.Linear(13, 5)
        self.again = nn.Linear(7, 13, bias=False)
        self.again.weight = self.up.weight
        self.scale, self.pair = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor([0.5, 2.0]))
        self.unused, self.frozen = nn.Parameter(torch.ones(11)), nn.Parameter(torch.randn(13), requires_grad=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids)
        h = self.down((self.up(x) * self.scale + self.again(x) + self.frozen).tanh())
        own = (self.down.bias.square() * self.pair.prod()).sum()
        return {"loss": h.square().mean() + own + self.scale * (labels > 3).sum() / labels.numel()}


class TokenWise(nn.Module):
    """Embedding, norms, gated layers with biases, a tied head; labels that are not counted; sizes that 4 divides."""

    def __init__(self, width: int = 8, tokens: int = 12, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(3 * width, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids)
        for norm, up, down in zip(self.norms, self.up, self.down):
            x = x + down(F.silu(up(norm(x))))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}
