"""Checkpoints and safetensors of pipelines on real processes: to other meshes and back, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

import autopar
from autopar import Checkpoints, Mesh, Plan
from autopar.models import gpt
from autopar.module import ParallelModule
from tests.launch import run_ranks

ROWS = 8
CHOICES: dict[str, dict[str, Any]] = {
    "pp=2,tp=2": {"microbatches": 2},
    "pp=2": {"microbatches": 2, "schedule": "interleaved"},
    "pp=1": {"microbatches": 2},
    "dp=2": {"zero": 1},
    "": {},
}

State = dict[str, Tensor]


def built(mesh: str) -> Any:
    """A model with tied embeddings on ``mesh``, or on "" the unmodified model."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = gpt.build(layers=3)
    if not mesh:
        return model
    return autopar.parallelize(model, Mesh.parse(mesh), Plan(check_numerics=False, **CHOICES[mesh]))


def batch(seed: int) -> dict[str, Tensor]:
    return gpt.example_batch(gpt.build(), ROWS, seed=seed)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    if isinstance(model, ParallelModule):
        loss = model.train_step(**batch(seed))
    else:
        loss = model(**batch(seed))["loss"]
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def held(model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Whole parameters, buffers and moments of what this rank's stages have."""
    found: State = {}
    for name, tensor in model.state_dict().items():
        found[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def leg(mesh: str, directory: Path, before_program: bool = False) -> tuple[State, State, float]:
    """Load the latest, train one step, save: what this rank holds as loaded, as saved, and the loss."""
    model = built(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if before_program else None
    if mesh:
        model.prepare(**batch(0))
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoints = Checkpoints(directory)
    resumed = checkpoints.load(model, optimizer)
    number = resumed.step if resumed else 0
    loaded = held(model, optimizer)
    loss = step(model, optimizer, number)
    checkpoints.save(number + 1, model, optimizer, wait=number % 2 == 0)
    checkpoints.wait()
    return loaded, held(model, optimizer), loss


def together(states: list[State]) -> State:
    """What all ranks hold; the same where several do."""
    whole: State = {}
    for state in states:
        for name, tensor in state.items():
            assert name not in whole or torch.equal(whole[name], tensor), name
            whole[name] = tensor
    return whole


LONG = ["pp=2,tp=2", "dp=2", "pp=2,tp=2", "", "pp=2,tp=2", "pp=1", "pp=2"]
JOURNEYS = [
    pytest.param(["pp=2", "dp=2", "pp=2"], id="short", marks=pytest.mark.slow),
    pytest.param(LONG, id="long", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("journey", JOURNEYS)
def test_from_mesh_to_mesh(journey: list[str], tmp_path: Path) -> None:
    model = built("")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    saved: State = {}
    for number, mesh in enumerate(journey):
        ranks = max(1, Mesh.parse(mesh).world_size)
        results = run_ranks(leg, ranks, mesh, tmp_path, number == len(journey) - 1)
        loaded = together([before for before, _, _ in results])
        assert not saved or loaded.keys() == saved.keys()
        for name in saved:
            assert torch.equal(loaded[name], saved[name]), (mesh, name)
        saved = together([after for _, after, _ in results])
        expected = step(model, optimizer, number)
        assert all(abs(loss / expected - 1) < 1e-12 for _, _, loss in results), mesh
    here = held(model, optimizer)
    assert here.keys() == saved.keys()
    assert max(float((here[name] - saved[name]).abs().max()) for name in here) < 1e-12
    other = built("")  # and into the unmodified model
    moments = torch.optim.AdamW(other.parameters(), lr=1e-2)
    Checkpoints(tmp_path).load(other, moments)
    found = held(other, moments)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def weights_over(mesh: str, read: Path, write: Path) -> tuple[int, State, tuple[str, ...], int]:
    """From the files in ``read`` onto a mesh, the model on the meta device, and to files in ``write``."""
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        model = gpt.build(layers=3)
    parallel = autopar.parallelize(
        model, Mesh.parse(mesh), Plan(check_numerics=False, **CHOICES[mesh]), example_inputs=batch(0)
    )
    loaded = autopar.load_safetensors(parallel, read)
    found = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in parallel.state_dict().items()}
    local = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parallel.parameters())
    autopar.save_safetensors(parallel, write, max_shard_size=100_000)
    return loaded.bytes_read, {n: t.detach().clone() for n, t in found.items()}, loaded.initialised, local


@pytest.mark.parametrize("mesh", ["pp=2,tp=2", "pp=2"])
def test_safetensors(mesh: str, tmp_path: Path) -> None:
    model = built("")
    autopar.save_safetensors(model, tmp_path / "one")
    results = run_ranks(weights_over, Mesh.parse(mesh).world_size, mesh, tmp_path / "one", tmp_path / "many")
    whole = model.state_dict()
    found = together([state for _, state, _, _ in results])
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    for count, _, initialised, local in results:
        assert not initialised
        assert count == local  # a rank reads what it holds, no more
    names: list[str] = []
    for path in (tmp_path / "many").glob("*.safetensors"):
        names += safe_open(path, "pt").keys()
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()}) + len(list(model.buffers()))
    other = built("")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    autopar.load_safetensors(other, tmp_path / "many")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in other.state_dict().items())
