"""Torch's own checkpoints of models with fused weights, saved on one mesh and loaded on another."""

from __future__ import annotations

import copy
import shutil
import tempfile
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, Optimizer

import autopar
from autopar import Mesh, Plan
from tests.against_one_process import difference, float64
from tests.launch import run_ranks
from tests.runtime.fused import Fused, batch

Where = tuple[Mesh, dict[str, Any]]
TP: Where = Mesh(tp=2), {}
ZERO: Where = Mesh(dp=2), {"zero": 3}
ONE: Where = Mesh(dp=2, tp=1), {"zero": 1}
BOTH: Where = Mesh(dp=2, tp=2), {"zero": 2}
FOUR: Where = Mesh(dp=4), {"zero": 3}
STAGES: Where = Mesh(pp=2), {}
Run = tuple[nn.Module, Optimizer]


def run_of(model: nn.Module) -> Run:
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9)


def parallel(model: nn.Module, where: Where) -> Run:
    mesh, choices = where
    return run_of(autopar.parallelize(model, mesh, Plan(check_numerics=False, **choices), example_inputs=batch(0)))


def train(run: Run, *numbers: int) -> None:
    model, optimizer = run
    for number in numbers:
        optimizer.zero_grad()
        model(**batch(number)).backward()
        optimizer.step()


def off(run: Run, reference: Run) -> float:
    """The largest difference of a parameter, a gradient or a momentum, each gathered by ``full_tensor()``."""
    wanted, found = dict(reference[0].named_parameters()), 0.0
    for name, parameter in run[0].named_parameters():
        pairs = [(parameter, wanted[name]), *((run[1].state[parameter][key], value)
                 for key, value in reference[1].state[wanted[name]].items())]  # fmt: skip
        if parameter.grad is not None and wanted[name].grad is not None:
            pairs.append((parameter.grad, wanted[name].grad))
        found = max([found, *(difference(ours, theirs) for ours, theirs in pairs)])
    return found


def by_files(source: Run, target: Run, save: Any) -> None:
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where, src=0)
    weights, states = get_state_dict(*source)
    saved = save({"model": weights, "optimizer": states}, checkpoint_id=where[0])
    if save is dcp.async_save:
        saved.result()
    weights, states = get_state_dict(*target)
    held = {"model": weights, "optimizer": states}
    dcp.load(held, checkpoint_id=where[0])
    set_state_dict(*target, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    dist.barrier()
    shutil.rmtree(where[0] or "", ignore_errors=True)


def as_whole_tensors(source: Run, target: Run, from_rank_0: bool) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=from_rank_0)
    weights = get_model_state_dict(source[0], options=options)
    states = get_optimizer_state_dict(*source, options=options)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
    set_model_state_dict(target[0], weights, options=options)
    set_optimizer_state_dict(*target, states, options=options)


WAYS = {
    "saved": lambda source, target: by_files(source, target, dcp.save),
    "saved meanwhile": lambda source, target: by_files(source, target, dcp.async_save),
    "whole": lambda source, target: as_whole_tensors(source, target, False),
    "from rank 0": lambda source, target: as_whole_tensors(source, target, True),
}


def move(before: Where, after: Where, ways: list[str]) -> dict[str, float]:
    model = float64(Fused)
    targets = [copy.deepcopy(model) for _ in ways]
    theirs, ours = run_of(copy.deepcopy(model)), parallel(model, before)
    train(theirs, 0, 1)
    train(ours, 0, 1)
    found = {"before": off(ours, theirs)}
    for way, target in zip(ways, targets):
        run = parallel(target, after)
        WAYS[way](ours, run)
        other = copy.deepcopy(theirs)
        found[f"{way}, loaded"] = off(run, other)
        train(run, 2)
        train(other, 2)
        found[f"{way}, trained on"] = off(run, other)
    return found


@pytest.mark.parametrize(
    ("before", "after", "ways"),
    [
        pytest.param(TP, ZERO, ["saved", "from rank 0"], id="tp-zero"),
        pytest.param(STAGES, ZERO, ["saved", "whole", "from rank 0"], id="pp-zero"),
        pytest.param(STAGES, STAGES, list(WAYS), id="pp-pp", marks=pytest.mark.slow),
        pytest.param(ZERO, STAGES, list(WAYS), id="zero-pp", marks=pytest.mark.slow),
        pytest.param(TP, ZERO, ["saved meanwhile", "whole"], id="tp-zero-others", marks=pytest.mark.slow),
        pytest.param(ZERO, TP, list(WAYS), id="zero-tp", marks=pytest.mark.slow),
        pytest.param(TP, ONE, list(WAYS), id="tp-one", marks=pytest.mark.slow),
        pytest.param(BOTH, FOUR, list(WAYS), id="both-four", marks=pytest.mark.slow),
        pytest.param(FOUR, BOTH, list(WAYS), id="four-both", marks=pytest.mark.slow),
    ],
)
def test_a_run_moves_to_another_mesh(before: Where, after: Where, ways: list[str]) -> None:
    for errors in run_ranks(move, before[0].world_size, before, after, ways):
        assert max(errors.values()) < 1e-12, errors
