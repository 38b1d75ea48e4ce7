"""What each rank has of a batch: every element once on each place of the other axes, as the program lays it out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from autopar import Mesh, Plan
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
