"""The programs that mutations are planted in: tiny models in float64 on meshes of 2 to 4 ranks, compiled once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.compiler import compile_program
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.models import llama, moe
from autopar.plan import Plan
from autopar.precision import Precision
from tests.proof import case_models

Batch = dict[str, Tensor]
Made = tuple[nn.Module, Batch]
TOKENS = 16  # of a row


class Net(nn.Module):
    """Two layers with bias, dropout between them, two parameters of one shape; rows count unequally in its loss."""

    def __init__(self, width: int = 8, drop: float = 0.5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.first, self.second = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.drop(functional.gelu(self.up(x * self.first)))
        return functional.cross_entropy(self.down(h) + self.second, labels)


class Normalised(nn.Module):
    """Batch normalisation, whose moments are those of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.down(self.norm(self.up(x)).relu()), labels)


class Fused(nn.Module):
    """Attention with one weight for queries, keys and values; ``documents``: rows of several texts."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        at = torch.arange(length)
        seen = (at[None, :] <= at[:, None]) & (documents[:, None, :, None] == documents[:, None, None, :])
        y = functional.scaled_dot_product_attention(q, k, v, seen)
        return self.out(y.transpose(1, 2).reshape(rows, length, width)).square().sum()


class Tied(nn.Module):
    """One table at both ends of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(16, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        h = self.table(tokens)
        for layer in self.mid:
            h = h + layer(h).tanh()
        return functional.cross_entropy((h @ self.table.weight.t()).flatten(0, 1), labels.flatten())


def _labels(rows: int, *more: int, below: int) -> Tensor:
    """Labels of which the first rows have fewer that count."""
    labels = torch.randint(0, below, (rows, *more))
    labels.view(-1)[: labels.numel() // 6 + 1] = -100
    return labels


def _decoder(**more: int) -> Made:
    model = llama.build("tiny", **{"layers": 1, "width": 16, "heads": 4, "kv_heads": 4, "ff": 24, "vocab": 16, **more})
    return model, llama.example_batch(model.config, 4, TOKENS)


def _experts() -> Made:
    model = moe.build("tiny", layers=1)
    return model, moe.example_batch(model.config, 4, TOKENS)


MODELS: dict[str, Callable[[], Made]] = {
    "decoder": _decoder,
    "two layers": lambda: _decoder(layers=2),
    "odd vocabulary": lambda: _decoder(vocab=15),
    "experts": _experts,
    "net": lambda: (Net(drop=0.0), {"x": torch.randn(8, 8), "labels": _labels(8, below=8)}),
    "dropout": lambda: (Net(), {"x": torch.randn(8, 8), "labels": _labels(8, below=8)}),
    "odd net": lambda: (Net(7, 0.0), {"x": torch.randn(7, 7), "labels": _labels(7, below=7)}),
    "batch norm": lambda: (Normalised(), {"x": torch.randn(8, 8), "labels": _labels(8, below=4)}),
    "fused": lambda: (Fused(), {"x": torch.randn(4, TOKENS, 16), "documents": torch.arange(TOKENS).repeat(4, 1) // 6}),
    "scheduled": lambda: (case_models.Scheduled(), {"x": torch.randn(8, 8), "labels": _labels(8, below=4)}),
    "scratch": lambda: (case_models.Scratch(), {"x": torch.randn(4, 8)}),
    "cell": lambda: (case_models.Cell(), {name: torch.randint(0, 12, (4, 3)) for name in ("tokens", "labels")}),
    "noisy": lambda: (case_models.Noisy(), {"x": torch.randn(4, 8)}),
    "uneven head": lambda: (
        case_models.UnevenHead(),
        {name: torch.randint(0, 7, (4, 6)) for name in ("tokens", "labels")},
    ),
    "grouped": lambda: (case_models.Grouped(), {"x": torch.randn(4, 4, 5)}),
    "few keys": lambda: (case_models.FewKeys(), {"x": torch.randn(4, 8, 16)}),
    "contrasted": lambda: (case_models.Contrasted(), {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}),
    "masked": lambda: (
        case_models.Masked(),
        {"x": torch.randn(4, 6, 8), "mask": (torch.arange(24).view(4, 6) > 7).double()},
    ),
    "reporting": lambda: (case_models.Reporting(), {"x": torch.randn(4, 6)}),
    "tied": lambda: (Tied(), {"tokens": torch.randint(0, 16, (4, 8)), "labels": _labels(4, 8, below=16)}),
}


@dataclass(frozen=True)
class Case:
    """What is compiled."""

    model: str
    axes: dict[str, int]
    choices: dict[str, Any] = field(default_factory=dict)


BARE = {"bucket_mb": 0.0, "overlap_mb": 0.0}  # each collective by itself, where it stands
CASES: dict[str, Case] = {
    "dp tp": Case("decoder", {"dp": 2, "tp": 2}, BARE),
    "buckets": Case("decoder", {"dp": 2, "sp": 2}),
    "megatron": Case("decoder", {"tp": 2}, {"sequence": "megatron", **BARE}),
    "ring": Case("decoder", {"sp": 4}, {"attention": "ring", **BARE}),
    "ulysses": Case("decoder", {"dp": 2, "sp": 2}, {"attention": "ulysses", **BARE}),
    "zero 3": Case("decoder", {"dp": 2, "sp": 2}, {"zero": 3, **BARE}),
    "zero 2": Case("net", {"dp": 2, "tp": 2}, {"zero": 2, **BARE}),
    "recompute": Case("two layers", {"tp": 2}, {"recompute": "full", **BARE}),
    "odd vocabulary": Case("odd vocabulary", {"tp": 2}, BARE),
    "ep": Case("experts", {"ep": 2}, BARE),
    "capacity": Case("experts", {"ep": 2}, {"capacity_factor": 12.0, **BARE}),
    "net": Case("net", {"dp": 2, "tp": 2}, BARE),
    "dropout": Case("dropout", {"dp": 2, "tp": 2}, BARE),
    "odd net": Case("odd net", {"dp": 2}, {"zero": 3, **BARE}),
    "bf16": Case("net", {"dp": 2}, {"precision": Precision(param="bfloat16"), **BARE}),
    "bf16, summed in f32": Case("net", {"dp": 2}, {"precision": Precision("bfloat16", "float32"), **BARE}),
    "batch norm": Case("batch norm", {"dp": 2}, BARE),
    "fused": Case("fused", {"tp": 2}, BARE),
    "documents": Case("fused", {"sp": 2}, {"attention": "ring", **BARE}),
    "pipeline": Case("two layers", {"pp": 2, "tp": 2}, {"microbatches": 4, **BARE}),
    "scheduled": Case("scheduled", {"dp": 2}, BARE),
    "scratch": Case("scratch", {"dp": 2}, BARE),
    "cell": Case("cell", {"dp": 2}, BARE),
    "noisy": Case("noisy", {"tp": 2}, BARE),
    "uneven head": Case("uneven head", {"tp": 2}, {"sequence": "megatron", "on_indivisible": "replicate", **BARE}),
    "grouped": Case("grouped", {"dp": 4}, {"zero": 3}),
    "few keys": Case("few keys", {"tp": 2}, BARE),
    "contrasted": Case("contrasted", {"dp": 2}, BARE),
    "masked": Case("masked", {"dp": 2}, BARE),
    "reporting": Case("reporting", {"pp": 2}, {"microbatches": 2, **BARE}),
    "pipeline dp": Case("two layers", {"pp": 2, "dp": 2}, {"microbatches": 2, **BARE}),
    "tied": Case("tied", {"pp": 2}, {"microbatches": 2, **BARE}),
}


@cache
def made(model: str) -> Made:
    torch.manual_seed(0)
    built, batch = MODELS[model]()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return built.double(), batch


@cache
def right(case: str) -> AnyProgram:
    """The program as the compiler makes it; mutations change copies of it."""
    wanted = CASES[case]
    model, batch = made(wanted.model)
    plan = Plan(check_numerics=False, **wanted.choices)
    return compile_program(model, Mesh(**wanted.axes), plan, (), batch)
