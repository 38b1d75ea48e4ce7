"""Optimizer states of experts that a mesh with ep holds as one stack: from that mesh to one without, and back."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import autopar
from autopar import Checkpoints, Mesh, ParallelModule, Plan
from autopar.ir.stacked_parameters import is_stacked
from tests.launch import run_ranks
from tests.loops_over_experts import WIDTH, Mixture


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        loss = model.train_step(batch(number)) if isinstance(model, ParallelModule) else model(batch(number))
        if not isinstance(model, ParallelModule):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def to_and_fro(directory: Path) -> list[float]:
    torch.set_default_dtype(torch.float64)
    alone = Mixture()
    first = copy.deepcopy(alone)
    found, stop = [], 0
    wanted = adam(alone)
    for turn, (mesh, zero) in enumerate(((Mesh(ep=2), 1), (Mesh(dp=2), 2), (Mesh(ep=2), 0))):
        parallel = autopar.parallelize(copy.deepcopy(first), mesh, Plan(zero=zero))
        parallel.prepare(batch(0))
        stacked = any(is_stacked(name) for name, _ in parallel.named_parameters())
        assert stacked == (mesh.size("ep") > 1)
        optimizer = adam(parallel)
        if turn:
            Checkpoints(directory).load(parallel, optimizer)
        steps(parallel, optimizer, range(stop, stop + 2))
        steps(alone, wanted, range(stop, stop + 2))
        stop += 2
        Checkpoints(directory).save(stop, parallel, optimizer)
        whole = parallel.full_state_dict()
        found += [float((whole[name] - tensor).abs().max()) for name, tensor in alone.state_dict().items()]
    return found


def test_between_meshes_with_and_without_stacks(tmp_path: Path) -> None:
    for found in run_ranks(to_and_fro, 2, tmp_path):
        assert found and max(found) < 1e-12
