"""ZeRO where ``ep`` splits some parameters already: these over ``dp`` (and ``sp``), the others over ``ep`` too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import Checkpoints, Mesh, Plan
from autopar.analysis.footprint import held
from autopar.check import TOLERANCE, Reference
from autopar.ir.node import value
from autopar.ir.tables import InputKind
from autopar.zoo.named import named_model
from tests.against_one_process import Errors, difference, float64, worst
from tests.checkpoint.test_checkpoints import everything, same, steps
from tests.end_to_end.test_training import TRAINED, train
from tests.experts_split import experts_split
from tests.launch import run_ranks
from tests.selection import slow_but

MESHES = ("dp=1,ep=2", "dp=2,ep=2", "dp=3,ep=2", "dp=2,ep=3", "dp=2,ep=2,sp=2", "dp_replicate=2,dp_shard=2,ep=2")


class Odd(nn.Module):
    """Five columns: no two ranks have as many of them as four ranks of one axis would. ``ep`` splits the other dim."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.up(x).tanh()) * self.scale
        return {"loss": y.square().sum(), "y": y}


def odd_batch(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


BATCHES = [odd_batch(seed) for seed in range(5)]


# ---------------------------------------------------------------- simulated: numbers, memory and the formulas


@pytest.mark.parametrize("mesh", slow_but([1, 3, 4], MESHES))
def test_each_parameter_is_split_over_what_does_not_split_it_yet(mesh: str) -> None:
    example, on = named_model("llama", batch=12), Mesh.parse(mesh)
    reference = Reference(example.model, example.batch)
    sizes = {name: parameter.numel() * 8 for name, parameter in reference.model.named_parameters()}
    rest = on.shard_axis(taken={"ep"})
    for zero in range(4):
        with experts_split():
            report = reference.check(on, Plan(zero=zero, check_numerics=False, on_indivisible="replicate"))
        assert report.worst <= TOLERANCE, (zero, report)
        if zero:
            holdings = held(report.program)
            assert holdings.rank * on.world_size == holdings.whole * on.size("dp_replicate")
            inputs = report.program.placeholders(InputKind.PARAMETER)
            groups = {entry.target: frozenset(value(node).layout.groups) for node, entry in inputs}
            assert set(groups.values()) == {frozenset({on.shard_axis()}), frozenset({"ep", rest} - {None})}
            experts = sum(size for name, size in sizes.items() if "ep" in groups[name]) // on.size("ep")
            counted = {(t.axis, t.name): t.bytes for t in report.step.traffic if t.phase == "backward"}
            ways = on.size(rest or "dp")
            assert counted.get((rest or "dp", "reduce_scatter"), 0) == experts * (ways - 1) // ways


def test_sizes_that_do_not_divide() -> None:
    reference = Reference(Odd(), BATCHES[0])
    for zero in range(4):
        with experts_split():
            report = reference.check(Mesh(dp=2, ep=2), Plan(zero=zero, on_indivisible="replicate"))
        assert report.worst <= TOLERANCE, (zero, report)


# ---------------------------------------------------------------- real ranks


def train_llama(zero: int) -> Errors:
    with experts_split():
        return train(*TRAINED["llama"], Mesh(dp=2, ep=2), Plan(zero=zero, check_numerics=False), "sgd")


@pytest.mark.parametrize("zero", slow_but([1], [1, 3]))
def test_training_equals_one_process(zero: int) -> None:
    """With clipping by torch's own function, which takes all parameters on one DeviceMesh."""
    for errors in run_ranks(train_llama, 4, zero):
        assert worst(errors) < (TOLERANCE, ""), worst(errors)


def train_odd(zero: int) -> tuple[Errors, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """A few steps of AdamW, clipped; of each parameter the dims of its mesh, and the shape of the part here."""
    model = float64(Odd)
    reference = copy.deepcopy(model)
    plan = Plan(zero=zero, check_numerics=False, on_indivisible="replicate")
    with experts_split():
        parallel = autopar.parallelize(model, Mesh(dp=2, ep=2), plan, example_inputs=BATCHES[0])
    errors: Errors = {}
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (parallel, reference))
    for step, batch in enumerate(BATCHES):
        losses = [parallel.train_step(**batch), reference(**batch)["loss"]]
        losses[1].backward()
        errors[f"loss {step}"] = difference(*losses)
        norms = parallel.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        errors[f"norm {step}"] = difference(*norms)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    full = parallel.full_state_dict()
    errors |= {name: difference(full[name], tensor) for name, tensor in reference.state_dict().items()}
    found = {}
    for name, parameter in parallel.named_parameters():
        assert isinstance(parameter, DTensor)
        found[name] = parameter.device_mesh.mesh_dim_names, tuple(parameter.to_local().shape)
    return errors, found


def test_uneven_parts_are_held_on_a_mesh_of_their_own() -> None:
    results = run_ranks(train_odd, 4, 3)
    for errors, _ in results:
        assert worst(errors) < (1e-10, ""), worst(errors)
    names = {name: dims for name, (dims, _) in results[0][1].items()}
    assert {name for name, dims in names.items() if dims == ("dp_ep",)} == {"down.bias", "scale"}
    assert {dims for name, dims in names.items() if "weight" in name or name == "up.bias"} == {("dp", "ep")}
    assert [found["scale"][1] for _, found in results] == [(2,), (2,), (1,), (0,)]
    assert [found["up.weight"][1] for _, found in results] == [(3, 5)] * 4


JOURNEY = (("dp=2,ep=2", 3), ("dp=4", 3), ("dp=2,ep=2", 1), ("dp=1,ep=2", 3), ("dp=2,ep=2", 0))


def leg(mesh: str, zero: int, directory: Path) -> tuple[Any, Any, list[float]]:
    """Load the latest checkpoint and train one step, with ``ep`` splitting parameters; save weights as files too."""
    plan = Plan(zero=zero, check_numerics=False, on_indivisible="replicate")
    with experts_split():
        model = autopar.parallelize(float64(Odd), Mesh.parse(mesh), plan, example_inputs=BATCHES[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    checkpoints = Checkpoints(directory)
    resumed = checkpoints.load(model, optimizer, scheduler=scheduler)
    position = resumed.data["position"] if resumed else 0
    before = everything(model, optimizer) if resumed else None
    if resumed:
        autopar.load_safetensors(model, directory / f"weights {position}")
        assert before is not None and same(everything(model, optimizer), before)
    losses = steps(model, optimizer, scheduler, BATCHES[position : position + 1])
    checkpoints.save(position + 1, model, optimizer, scheduler=scheduler, data={"position": position + 1})
    autopar.save_safetensors(model, directory / f"weights {position + 1}")
    return before, everything(model, optimizer), losses


@pytest.mark.slow
def test_checkpoints_from_mesh_to_mesh(tmp_path: Path) -> None:
    model = float64(Odd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = steps(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), BATCHES[: len(JOURNEY)])
    saved = None
    for position, (mesh, zero) in enumerate(JOURNEY):
        results = run_ranks(leg, Mesh.parse(mesh).world_size, mesh, zero, tmp_path)
        for before, after, losses in results:
            assert (before is None) == (saved is None) and (before is None or same(before, saved)), (mesh, zero)
            assert abs(losses[0] / expected[position] - 1) < 1e-12 and same(after, results[0][1]), (mesh, zero)
        saved = results[0][1]
