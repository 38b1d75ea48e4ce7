"""Batches of many lengths on real ranks: a few compiles, then one program for all; numbers as on one device."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.cache import compiled as cache_compiled
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.plan import Plan
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-10
LLAMA = llama.Config(vocab=64, context=128, width=16, layers=2, heads=4, kv_heads=2, ff=32)
MIXTURE = moe.Config(vocab=64, context=128, width=16, layers=2, heads=4, kv_heads=2, ff=16, experts=4, top_k=2)
GPT = gpt.Config(vocab=64, context=128, width=16, layers=2, heads=4)
MODELS: dict[str, Any] = {
    "llama": lambda: llama.Llama(LLAMA),
    "mixture": lambda: moe.Mixtral(MIXTURE),
    "gpt": lambda: gpt.GPT(GPT),
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = MODELS[name]().double()
    return built


def batches(steps: int, unit: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of 8 rows, and a length that a collator might give: multiples of ``unit``; some rows have fewer labels."""
    lengths = random.Random(seed)
    found = []
    for step in range(steps):
        length = unit * lengths.randint(-(-6 // unit), 60 // unit)
        ids = torch.randint(0, 64, (8, length), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        labels[step % 8, 1:] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def train(module: nn.Module, given: list[dict[str, Tensor]]) -> tuple[list[float], dict[str, Tensor]]:
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    for batch in given:
        if isinstance(module, autopar.ParallelModule):
            loss = module.train_step(**batch)
        else:
            loss = module(**batch)["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if isinstance(module, autopar.ParallelModule):
        return losses, module.full_state_dict()
    return losses, {name: tensor.detach() for name, tensor in module.state_dict().items()}


def train_parallel(name: str, mesh: str, plan: dict[str, Any], steps: int, unit: int) -> tuple[int, float, float, str]:
    """Compiles, the largest error of a loss and of a weight after training, and what the family says of itself."""
    torch.set_default_dtype(torch.float64)
    given, compiles = batches(steps, unit), 0
    original = cache_compiled.compile_program

    def counted(*args: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return original(*args)

    cache_compiled.compile_program = counted  # type: ignore[attr-defined]
    parallel = autopar.parallelize(model(name), Mesh.parse(mesh), Plan(check_numerics=False, **plan))
    losses, weights = train(parallel, given)
    expected, right = train(model(name), given)
    error = max(float((weights[key] - right[key]).abs().max()) for key in right)
    family = "; ".join(map(str, parallel.families))
    return compiles, max(abs(a - b) for a, b in zip(losses, expected)), error, family


CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {  # model, mesh, plan, unit of the lengths
    "alone": ("llama", "dp=1", {}, 1),
    "dp": ("llama", "dp=2", {}, 1),
    "zero": ("gpt", "dp=2", {"zero": 3}, 1),
    "zero-1": ("llama", "dp=2", {"zero": 1}, 1),
    "tp": ("gpt", "tp=2", {}, 1),
    "megatron": ("llama", "tp=2", {"sequence": "megatron"}, 2),
    "sp": ("llama", "sp=2", {}, 4),
    "ulysses": ("gpt", "sp=2", {"attention": "ulysses"}, 4),
    "ep": ("mixture", "ep=2", {}, 1),
    "pp": ("llama", "pp=2", {"microbatches": 4}, 1),
    "uneven microbatches": ("llama", "pp=2", {"microbatches": 3}, 1),
    "accumulating": ("llama", "dp=2", {"microbatches": 2}, 1),
    "recompute": ("llama", "dp=2", {"recompute": "full"}, 1),
    "dp tp": ("llama", "dp=2,tp=2", {"zero": 2}, 1),
    "pp dp": ("gpt", "pp=2,dp=2", {"microbatches": 2, "zero": 1}, 1),
    "dp ep": ("mixture", "dp=2,ep=2", {"zero": 3}, 1),
    "sp tp": ("llama", "sp=2,tp=2", {}, 4),
    "pp tp megatron": ("llama", "pp=2,tp=2", {"microbatches": 4, "sequence": "megatron"}, 2),
}


@pytest.mark.parametrize("case", slow_but((6,), list(CASES)))
def test_few_compiles_and_the_numbers_of_one_device(case: str) -> None:
    name, mesh, plan, unit = CASES[case]
    steps = 12
    for compiles, loss, weight, family in run_ranks(
        train_parallel, Mesh.parse(mesh).world_size, name, mesh, plan, steps, unit
    ):
        assert loss <= EXACT and weight <= EXACT
        assert compiles <= 4, family


class Careful(nn.Module):
    """Reads an attribute for long batches alone; may leave the length in an attribute."""

    def __init__(self, leaves_length: bool) -> None:
        super().__init__()
        self.weight, self.scale, self.leaves_length, self.length = nn.Parameter(torch.ones(1)), 2.0, leaves_length, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.leaves_length:
            self.length = x.shape[1]
        if x.shape[1] > 20:
            x = x * self.scale
        else:
            x = x * 2.0
        return (x * self.weight).sum()


def change_what_long_batches_read() -> list[float]:
    model = autopar.parallelize(Careful(False), Mesh(dp=1))
    for length in (8, 30, 12):
        model(torch.ones(2, length))
    model.scale = 3.0
    return [float(model(torch.ones(2, length)).detach()) for length in (25, 15)]


def test_what_other_lengths_read_is_guarded() -> None:
    assert run_ranks(change_what_long_batches_read, 1) == [[150.0, 60.0]]


def leave_lengths() -> list[int]:
    model = autopar.parallelize(Careful(True), Mesh(dp=1))
    found = []
    for length in (8, 30, 12, 25):
        model(torch.ones(2, length))
        found.append(model.length)
    return found


def test_what_forward_leaves_is_that_of_the_length() -> None:
    assert run_ranks(leave_lengths, 1) == [[8, 30, 12, 25]]
