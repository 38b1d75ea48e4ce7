"""What each rank has of a batch: every element once on each place of the other axes, as the program lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from autopar import Checkpoints, Mesh, Plan
from autopar.data.parts import BatchesOfRank, Share, part_of_batch
from autopar.errors import IndivisibleError, LaunchError
from autopar.ir.layout import Factor, Layout, shard

MESHES = ("dp=2,sp=2", "sp=4", "dp_replicate=2,dp_shard=2,sp=2", "pp=2,dp=2,tp=2", "tp=2", "dp=2,ep=2,sp=2")


@pytest.mark.parametrize("text", MESHES)
def test_the_part_is_that_of_the_layout(text: str) -> None:
    mesh = Mesh.parse(text)
    ids = torch.randint(0, 99, (8, 12))
    rows = tuple(axis for axis in mesh.names if axis.startswith("dp") or axis == "ep")
    layout = Layout(((Factor(8, rows),), (Factor(12, ("sp",) if "sp" in text else ()),)))
    for rank in range(mesh.world_size):
        part = part_of_batch({"ids": ids, "scale": 2.0, "one": torch.ones(())}, mesh, rank=rank)
        assert torch.equal(part["ids"], shard(ids, layout, mesh, mesh.coordinates(rank)))
        assert part["scale"] == 2.0 and part["one"].shape == ()


def test_dims_as_the_plan_says() -> None:
    batch = {"x": torch.randn(6, 4, 8), "table": torch.randn(4, 6), "labels": torch.arange(24).view(4, 6)}
    plan = Plan(batch_dims={"x": 1, "table": None}, sequence_dims={"x": 0, "table": None})
    part = part_of_batch(batch, Mesh(dp=2, sp=3), plan, rank=5)
    assert torch.equal(part["x"], batch["x"][4:, 2:]) and torch.equal(part["table"], batch["table"])
    assert torch.equal(part["labels"], batch["labels"][2:, 4:])


def test_a_part_does_not_keep_the_whole() -> None:
    part = part_of_batch({"ids": torch.zeros(8, 1000, dtype=torch.int64)}, Mesh(dp=2), rank=1)
    assert part["ids"].untyped_storage().nbytes() == 4 * 1000 * 8


def test_what_does_not_divide() -> None:
    with pytest.raises(IndivisibleError, match=r"input 'ids' \[4, 9\] on mesh\(sp=2\).*9 positions.*2 parts") as found:
        part_of_batch({"ids": torch.zeros(4, 9, dtype=torch.int64)}, Mesh(sp=2), rank=0)
    assert "autopar.pad_batch" in str(found.value)
    with pytest.raises(IndivisibleError, match="3 rows does not divide into 2 parts"):
        Share.of(Mesh(dp=2), 0).rows(3)


def test_a_process_without_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LaunchError, match="rank="):
        part_of_batch({}, Mesh(sp=2))
    assert part_of_batch({"x": 1}, Mesh(sp=1)) == {"x": 1}
    monkeypatch.setenv("RANK", "1")
    assert part_of_batch({"x": torch.arange(4).view(1, 4)}, Mesh(sp=2))["x"].tolist() == [[2, 3]]


def loaded(rank: int, mesh: Mesh, **settings: Any) -> list[Tensor]:
    data = TensorDataset(torch.arange(22))
    order = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    batches = BatchesOfRank(order, 8, mesh, rank=rank)
    return [rows for (rows,) in DataLoader(data, batch_sampler=batches, **settings)]


def test_batches_of_a_shuffling_sampler() -> None:
    mesh = Mesh(dp=2, sp=2)
    found = [loaded(rank, mesh) for rank in range(4)]
    order = list(RandomSampler(range(22), generator=torch.Generator().manual_seed(3)))
    for step in range(2):
        assert found[0][step].tolist() == found[1][step].tolist() == order[8 * step : 8 * step + 4]
        assert found[2][step].tolist() == found[3][step].tolist() == order[8 * step + 4 : 8 * step + 8]
    assert [len(each) for each in found] == [2] * 4 and len(BatchesOfRank(range(22), 8, mesh, rank=0)) == 2


def test_a_sampler_goes_on_where_it_was() -> None:
    whole = BatchesOfRank(range(10), 2, Mesh(dp=2), shuffle=3, rank=1)
    epochs = [list(whole) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3, "another order each time"
    both = [list(BatchesOfRank(range(10), 2, Mesh(dp=2), shuffle=3, rank=rank)) for rank in (0, 1)]
    assert sorted(index for epoch in both for (index,) in epoch) == list(range(10))
    stopped = BatchesOfRank(range(10), 2, Mesh(dp=2), shuffle=3, rank=1)
    assert list(stopped) == epochs[0]
    running = iter(stopped)
    assert [next(running) for _ in range(3)] == epochs[1][:3]
    resumed = BatchesOfRank(range(10), 2, Mesh(dp=2), shuffle=3, rank=1)
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == epochs[1][3:] and list(resumed) == epochs[2]
    with pytest.raises(ValueError, match="batches of 2 rows, and these have 4"):
        BatchesOfRank(range(10), 4, Mesh(dp=2), rank=0).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_state_of_a_loader_is_in_the_checkpoint(tmp_path: Path, workers: int) -> None:
    """A ``StatefulDataLoader`` that is loaded gives the batches that the run would have had."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    data, model = TensorDataset(torch.arange(40)), nn.Linear(2, 2)

    def loader() -> Any:
        batches = BatchesOfRank(range(40), 4, Mesh(dp=1), shuffle=1)
        return stateful(data, batch_sampler=batches, num_workers=workers)

    first = loader()
    epoch = [batch for (batch,) in first]
    running = iter(first)
    for _ in range(3):
        next(running)
    Checkpoints(tmp_path).save(3, model, data=first.state_dict())
    rest = [batch.tolist() for (batch,) in running]
    resumed = loader()
    found = Checkpoints(tmp_path).load(model)
    assert found is not None
    resumed.load_state_dict(found.data)
    assert [batch.tolist() for (batch,) in resumed] == rest and len(rest) == 7
    assert len(epoch) == 10 and len(list(resumed)) == 10
