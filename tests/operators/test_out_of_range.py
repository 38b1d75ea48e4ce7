"""Numbers of rows and classes that a table or a loss does not have are errors, also where a rank has some of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from autopar import Mesh
from autopar.operators import embedding_rows, vocabulary_sums

IDS = torch.tensor([[0, 4, 9], [5, 2, 7]])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), labels.flatten(), ignore_index=-7)


@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}], ids=str)
def test_ids_and_labels_that_there_are_not(sizes: dict[str, int]) -> None:
    """With four ranks the table has two rows of padding at its end, which are no rows of it either."""
    parallel = autopar.parallelize(Words(), Mesh(**sizes), example_inputs=(IDS, IDS))
    assert parallel.simulate(IDS, torch.where(IDS == 4, -7, IDS)).loss is not None
    for ids, labels in ((IDS + 1, IDS), (IDS - 1, IDS), (IDS, IDS + 1), (IDS, IDS - 1)):
        with pytest.raises((autopar.AutoparError, IndexError, RuntimeError), match="out of (range|bounds)"):
            parallel.simulate(ids, labels)


class Pooled(nn.Module):
    def __init__(self, mode: str, ragged: bool) -> None:
        super().__init__()
        self.bags, self.ragged = nn.EmbeddingBag(10, 8, mode=mode), ragged

    def forward(self, ids: Tensor) -> Tensor:
        found = self.bags(ids.flatten(), torch.arange(0, 6, 3)) if self.ragged else self.bags(ids)
        return found.square().sum()


@pytest.mark.parametrize(("mode", "ragged"), [("sum", False), ("mean", True), ("max", False)])
@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}, {"tp": 4}], ids=str)
def test_rows_of_bags_that_there_are_not(sizes: dict[str, int], mode: str, ragged: bool) -> None:
    parallel = autopar.parallelize(Pooled(mode, ragged), Mesh(**sizes), example_inputs=(IDS,))
    assert parallel.simulate(IDS).loss is not None
    for ids in (IDS + 1, IDS - 1):
        with pytest.raises(
            (autopar.AutoparError, IndexError, RuntimeError), match="(?i)out of (range|bounds)|valid range"
        ):
            parallel.simulate(ids)


def test_programs_from_before_name_no_size() -> None:
    table, rank = torch.arange(8.0).reshape(4, 2), torch.tensor(1)
    assert torch.equal(embedding_rows(table, torch.tensor([5, 99]), rank), torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
    sums = vocabulary_sums(torch.zeros(2, 4), torch.zeros(2), torch.tensor([5, 99]), rank, 8, 0.0)
    assert torch.equal(sums[1], torch.zeros(2))
