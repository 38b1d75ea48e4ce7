"""Checkpoints on real processes: any mesh and stage to any other, exactly; kills, damage, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

import autopar
from autopar import CheckpointError, Checkpoints, Mesh, Plan
from autopar.checkpoint import files as checkpoint_files
from autopar.errors import RankFailedError
from autopar.ir.loss import loss_of
from autopar.module import ParallelModule
from tests.against_one_process import GroupedHeads, Tiny, float64, tiny_batch
from tests.launch import run_ranks, try_ranks
from tests.selection import slow_but

BATCHES = [{key: x[:, :4].contiguous() for key, x in tiny_batch(rows=12, seed=seed).items()} for seed in range(6)]
JOURNEYS = [
    (Tiny, (("dp=2,tp=2", 3), ("", 0), ("dp=3", 2), ("dp_replicate=2,dp_shard=2", 3))),
    (GroupedHeads, (("dp=2,tp=2", 3), ("tp=2", 0), ("", 0), ("dp=2", 1))),
    (GroupedHeads, (("sp=2", 3), ("dp=2", 1), ("tp=2", 0), ("", 0))),
    (GroupedHeads, (("", 0), ("sp=2", 1), ("sp=2,tp=2", 0), ("sp=2", 2))),
]

State = dict[str, Tensor]


def prepared(build: Callable[[], nn.Module], mesh: str, zero: int) -> Any:
    """The model on ``mesh``, or on "" the unmodified model."""
    model = float64(build)
    if not mesh:
        return model
    plan = Plan(zero=zero, check_numerics=False)
    return autopar.parallelize(model, Mesh.parse(mesh), plan, example_inputs=BATCHES[0])


def everything(model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Whole parameters, buffers and moments by name, in the model's own order."""
    parallel = isinstance(model, ParallelModule)
    found = model.full_state_dict() if parallel else {k: v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{name}.{key}"] = whole.detach().clone() if isinstance(whole, Tensor) else whole
    return found


def same(found: State, expected: State) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def steps(model: Any, optimizer: Any, scheduler: Any, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    losses = []
    for batch in batches:
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses


Leg = tuple[State | None, State, list[float]]


def leg(build: Callable[[], nn.Module], mesh: str, zero: int, directory: Path) -> Leg:
    """Load the latest, train one step, save: (state as loaded, as saved, losses)."""
    model = prepared(build, mesh, zero)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    checkpoints = Checkpoints(directory)
    resumed = checkpoints.load(model, optimizer, scheduler)
    before = everything(model, optimizer) if resumed else None
    position = resumed.data["position"] if resumed else 0
    losses = steps(model, optimizer, scheduler, BATCHES[position : position + 1])
    after = everything(model, optimizer)
    checkpoints.save(
        position + 1, model, optimizer, scheduler=scheduler, data={"position": position + 1}, wait=position % 2 == 0
    )
    if position % 2:  # written in the background: the state of now, not of later
        steps(model, optimizer, scheduler, BATCHES[:1])
        checkpoints.wait()
    return before, after, losses


@pytest.mark.parametrize(
    ("build", "legs"), slow_but([2], JOURNEYS), ids=["tiny", "grouped", "from a split sequence", "to one"]
)
def test_from_mesh_to_mesh(build: type[nn.Module], legs: tuple[tuple[str, int], ...], tmp_path: Path) -> None:
    model = prepared(build, "", 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = steps(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), BATCHES[:4])
    saved: State | None = None
    for position, (mesh, zero) in enumerate(legs):
        results = run_ranks(leg, max(1, Mesh.parse(mesh).world_size), build, mesh, zero, tmp_path)
        for before, after, losses in results:
            assert (before is None) == (saved is None)
            assert before is None or saved is None or same(before, saved), (mesh, zero)
            assert abs(losses[0] / expected[position] - 1) < 1e-12, (mesh, zero)
            assert same(after, results[0][1])
        saved = results[0][1]
    assert Checkpoints(tmp_path).steps() == [2, 3, 4]


def test_torchs_own_functions_read_it(tmp_path: Path) -> None:
    results = run_ranks(leg, 2, GroupedHeads, "tp=2", 0, tmp_path)
    model = prepared(GroupedHeads, "", 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(found, checkpoint_id=checkpoint_files.path_of(tmp_path, 1), no_dist=True)
    flat = dict(found["model"]) | {
        f"{name}.{key}": value for name, state in found["optimizer"]["state"].items() for key, value in state.items()
    }
    assert same({name: flat[name] for name in results[0][1]}, results[0][1])


def two_groups(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The first has a learning rate that is a tensor."""
    first = {"params": parameters[:2], "lr": torch.tensor(0.1), "foreach": False}
    return torch.optim.AdamW([first, {"params": parameters[2:], "weight_decay": 0.5}])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Muon": lambda p: torch.optim.Muon([parameter for parameter in p if parameter.dim() == 2]),
    "groups": lambda p: two_groups(list(p)),
}


def train_with_each(directory: Path) -> dict[str, State]:
    """Two steps, a checkpoint, a third step, which another module that loaded it takes too: the state of the second."""
    found = {}
    models = [prepared(GroupedHeads, "tp=2", 0) for _ in range(2)]
    start = models[0].full_state_dict()
    for name, build in OPTIMIZERS.items():
        models[0].load_state_dict(start)
        optimizers = [build(model.parameters()) for model in models]
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]
        steps(models[0], optimizers[0], schedulers[0], BATCHES[:2])
        found[name] = everything(models[0], optimizers[0])
        Checkpoints(directory / name).save(2, models[0], optimizers[0], scheduler=schedulers[0])
        Checkpoints(directory / name).load(models[1], optimizers[1], scheduler=schedulers[1])
        for triple in zip(models, optimizers, schedulers):
            steps(*triple, BATCHES[2:3])
        states = [everything(*pair) for pair in zip(models, optimizers)]
        assert same(*states), name
    return found


def test_every_optimizer(tmp_path: Path) -> None:
    for found in run_ranks(train_with_each, 2, tmp_path):
        for name, build in OPTIMIZERS.items():  # and into the unmodified model
            model = prepared(GroupedHeads, "", 0)
            optimizer = build(model.parameters())
            Checkpoints(tmp_path / name).load(model, optimizer)
            assert same(everything(model, optimizer), found[name]), name


def be_killed(directory: Path, victim: int, where: str) -> str:
    rank = int(os.environ["RANK"])
    model = prepared(Tiny, "dp=2", 3)
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, model, data=rank)
    usual = getattr(checkpoint_files.Writer, where)

    def die_in_the_middle(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == victim:
            if where == "write_data":
                usual(self, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *args, **kwargs)

    setattr(checkpoint_files.Writer, where, die_in_the_middle)
    try:
        checkpoints.save(2, model)
    except RankFailedError as problem:
        return str(problem)
    return "no error"


@pytest.mark.parametrize(("victim", "where"), slow_but([1], [(1, "write_data"), (0, "finish")]))
def test_a_rank_killed_while_saving(victim: int, where: str, tmp_path: Path) -> None:
    results = try_ranks(be_killed, 2, tmp_path, victim, where, timeout=100.0)
    assert results[victim] is None
    assert "waited in " in str(results[1 - victim]), results
    assert list(tmp_path.glob(".step-00000002.*.partial/*.distcp"))
    assert Checkpoints(tmp_path).steps() == [1]
    model = prepared(Tiny, "", 0)
    resumed = Checkpoints(tmp_path).load(model)
    assert resumed is not None and (resumed.step, resumed.data) == (1, 0)
    Checkpoints(tmp_path).save(2, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_latest_stay(tmp_path: Path) -> None:
    model, checkpoints = Tiny(), Checkpoints(tmp_path, keep=2)
    assert checkpoints.load(model) is None
    for step in (1, 2, 3):
        checkpoints.save(step, model, data=step, wait=False)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    loaded = [checkpoints.load(model), checkpoints.load(model, step=2)]
    assert [found.data for found in loaded if found] == [3, 2]
    with pytest.raises(CheckpointError, match="there is a checkpoint of step 3 already"):
        checkpoints.save(3, model)
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def draw() -> list[float]:
    return [float(torch.rand(1)), float(numpy.random.rand()), random.random()]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    model = Tiny()
    Checkpoints(tmp_path).save(1, model)
    expected = draw()
    assert draw() != expected
    Checkpoints(tmp_path).load(model)
    assert draw() == expected


def dropout_goes_on(directory: Path, zero: int) -> list[float]:
    model = float64(lambda: Tiny(dropout=0.5))
    plan = Plan(zero=zero, check_numerics=False)
    parallel = autopar.parallelize(model, Mesh(dp=2), plan, example_inputs=BATCHES[0])
    checkpoints = Checkpoints(directory)
    if checkpoints.load(parallel) is None:
        loss_of(parallel(**BATCHES[0]))
        checkpoints.save(1, parallel)
    return [float(loss_of(parallel(**BATCHES[1])).detach())]


def test_dropout_masks_go_on(tmp_path: Path) -> None:
    first, again = (run_ranks(dropout_goes_on, 2, tmp_path, zero)[0] for zero in (3, 0))
    assert abs(first[0] / again[0] - 1) < 1e-12


class Wider(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8, dtype=torch.float32)
        self.fused = nn.Linear(8, 27)
        self.extra = nn.Parameter(torch.zeros(3))


def damage(path: Path, how: str) -> None:
    data = next(path.glob("*.distcp"))
    if how == "cut off":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "lost":
        data.unlink()
    elif how == "foreign":
        (path / "checkpoint.json").unlink()
    elif how == "no json":
        (path / "checkpoint.json").write_text("[]")
    elif how == "format":
        (path / "checkpoint.json").write_text(json.dumps({"format": 9, "files": {}}))
    else:
        metadata = path / ".metadata"
        metadata.write_bytes(b"x" * metadata.stat().st_size)


DAMAGES = {
    "cut off": r"damaged: __0_0.distcp has [\d,]+ bytes, it was written with [\d,]+ bytes",
    "lost": "damaged: __0_0.distcp is missing",
    "foreign": "is no complete checkpoint of autopar: it has no checkpoint.json",
    "no json": "is not what autopar writes",
    "format": "has format 9, and this autopar reads format 2",
    "metadata": ".metadata cannot be read",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage(how: str, tmp_path: Path) -> None:
    model = Tiny()
    Checkpoints(tmp_path).save(7, model)
    damage(tmp_path / "step-00000007", how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"step-00000007.*{DAMAGES[how]}"):
        Checkpoints(tmp_path).load(model, step=7)
    assert same(dict(model.state_dict()), before)


def test_another_model(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(7, float64(Tiny))
    model = Wider()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).load(model)
    assert str(caught.value).split("\n")[1:] == [
        "  it lacks 'extra'",
        "  it has 'down.bias', which this model does not have",
        "  'fused.weight' is float64[24, 8] in it and float64[27, 8] here",
        "  'fused.bias' is float64[24] in it and float64[27] here",
        "  'norm.weight' is float64[8] in it and float32[8] here",
    ]
    assert same(dict(model.state_dict()), before)


def test_another_optimizer(tmp_path: Path) -> None:
    model = Tiny()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, torch.optim.SGD(model.parameters(), momentum=0.9))
    parameters = list(model.parameters())
    with pytest.raises(CheckpointError, match="has the state of SGD, and this is AdamW"):
        checkpoints.load(model, torch.optim.AdamW(model.parameters()))
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    with pytest.raises(CheckpointError, match=r"1 groups of \[7\] .* 2 groups of \[1, 6\]"):
        checkpoints.load(model, torch.optim.SGD(groups))
    with pytest.raises(CheckpointError, match="has a parameter of shape .* that the model does not have"):
        checkpoints.load(model, torch.optim.SGD(Tiny().parameters()))
    with pytest.raises(CheckpointError, match="no state of a scheduler"):
        checkpoints.load(model, scheduler=torch.optim.lr_scheduler.LinearLR(torch.optim.SGD(parameters)))
    with pytest.raises(CheckpointError, match="LBFGS"):
        checkpoints.save(2, model, torch.optim.LBFGS(model.parameters()))


def load_in_other_states(directory: Path) -> list[bool]:
    """Before the layouts are known; and into a model on the meta device."""
    model = float64(Tiny)
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(zero=3, check_numerics=False))
    optimizer = torch.optim.AdamW(parallel.parameters())
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.load(parallel, optimizer)
        said = False
    except CheckpointError as problem:
        said = "model.prepare" in str(problem)
    checkpoints.load(parallel)
    with torch.device("meta"):
        empty = Tiny()
    on_meta = autopar.parallelize(empty, Mesh(dp=2), Plan(zero=3), example_inputs=BATCHES[0])
    optimizers = torch.optim.AdamW(on_meta.parameters())
    checkpoints.load(on_meta, optimizers)
    losses = [loss_of(m(**BATCHES[0])) for m in (parallel, on_meta)]
    losses[1].backward()
    optimizers.step()
    return [said, abs(float(losses[0] / losses[1]) - 1) < 1e-12, len(optimizers.state) == 7]


def test_models_without_layouts_or_data(tmp_path: Path) -> None:
    model = float64(Tiny)
    Checkpoints(tmp_path).save(1, model, torch.optim.AdamW(model.parameters()))
    assert all(all(found) for found in run_ranks(load_in_other_states, 2, tmp_path))
