"""Batches of a user's loader: random numbers of their own, passes one after the other, places to go on from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autopar import Mesh, Plan
from autopar.data.batch_source import Batch, Counts
from autopar.data.loader_stream import LoaderStream
from autopar.data.random_numbers import seeded
from autopar.data.token_sources import byte_tokens
from autopar.data.token_stream import TokenStream

ROWS = TensorDataset(torch.arange(10.0)[:, None].expand(10, 3))


def stream(loader: Iterable[Any], plan: Plan | None = None, mesh: Mesh | None = None, seed: int = 0) -> LoaderStream:
    return LoaderStream(loader, "--data own.py:loader", mesh or Mesh(dp=1), plan or Plan(), seed)


def shuffled() -> DataLoader[Any]:
    return DataLoader(ROWS, 4, shuffle=True)


def stateful() -> Any:
    """Its sampler is seeded when it is made."""
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    with seeded(0):
        return loader(ROWS, 4, shuffle=True)


def seen(batches: LoaderStream, first: int, last: int) -> list[list[float]]:
    return [batches(number)[0][:, 0].tolist() for number in range(first, last)]


class Noisy(Dataset[torch.Tensor]):
    """Rows that are drawn when they are read, of all three generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.tensor([float(torch.rand(())), np.random.rand(), random.random()])


def test_each_pass_has_an_order_of_its_own_that_nothing_else_changes() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = seen(stream(shuffled()), 0, 9)
    assert torch.equal(torch.get_rng_state(), before), "what the model draws is not changed by the data"
    torch.manual_seed(6)
    assert seen(stream(shuffled()), 0, 9) == whole != seen(stream(shuffled(), seed=1), 0, 9)
    passes = [sum(whole[start : start + 3], []) for start in (0, 3, 6)]
    assert all(sorted(each) == list(map(float, range(10))) for each in passes) and passes[0] != passes[1] != passes[2]
    noise = [torch.cat([batch[0] for batch in map(stream(DataLoader(Noisy(), 2)), range(3))]) for _ in range(2)]
    assert torch.equal(*noise) and len(noise[0].unique()) == 18


@pytest.mark.parametrize("make", [shuffled, stateful], ids=["counted", "stateful"])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 5], ids=str)
@pytest.mark.parametrize("looked", [False, True], ids=["", "first looked at"])
def test_a_run_goes_on_where_it_was(make: Any, done: int, looked: bool) -> None:
    whole, first, again = stream(make()), stream(make()), stream(make())
    assert seen(first, 0, done) == (every := seen(whole, 0, 8))[:done]
    place = first.place(done)
    if looked:  # before a checkpoint is loaded the program is made of the first batch
        again.first()
    assert again.batches_before(place) == done
    assert seen(again, done, 8) == every[done:]


def test_the_first_batch_is_looked_at_and_stays_the_first() -> None:
    batches = stream(shuffled())
    first = batches.first()
    assert batches.first() is first and batches(0) is first
    assert seen(batches, 1, 3) == seen(stream(shuffled()), 0, 3)[1:]


def test_evaluations_are_alike_and_leave_the_run_alone() -> None:
    batches = stream(shuffled())
    one = [batch[0] for batch in batches.once(None)]
    batches(0)
    two = [batch[0] for batch in batches.once(None)]
    assert all(map(torch.equal, one, two)) and len(one) == 3
    assert len(list(batches.once(2))) == 2 and seen(batches, 1, 2) == seen(stream(shuffled()), 0, 2)[1:]


def test_what_a_batch_counts() -> None:
    mesh, tokens = Mesh(dp=2, sp=2), {"input_ids": torch.zeros(4, 6), "labels": torch.zeros(4, 6)}
    assert stream([]).counts(tokens) == Counts(4, 24)
    assert stream([], Plan(inputs="local"), mesh).counts(tokens) == Counts(8, 96)
    assert stream([], Plan(inputs="local"), mesh).counts((torch.zeros(3, 2), torch.zeros(3))) == Counts(6, None)
    assert TokenStream(byte_tokens(bytes(60)), 2, 10).counts({}) == Counts(2, 20)


def generator() -> Iterator[Batch]:
    yield (torch.zeros(2, 2),)
    yield (torch.zeros(2, 2),)


WRONG = [
    ([], "gives no batch: it is empty"),
    (generator(), "ended after 2 batches, and gave none when it was gone through again"),
    ([3], "gives int, which is no batch"),
    ([{"x": np.zeros(3)}], "gives a batch without a tensor: it has numpy.ndarray"),
    ([()], "gives a batch without a tensor: it has nothing"),
    ([(torch.zeros(0, 3),)], "gives a batch without rows"),
]


@pytest.mark.parametrize("loader, said", WRONG, ids=[said for _, said in WRONG])
def test_what_is_no_loader_of_batches(loader: Iterable[Any], said: str) -> None:
    batches = stream(loader)
    with pytest.raises(ValueError, match=f"--data own.py:loader {said}\\b.*\nWay out: ") as error:
        seen(batches, 0, 4)
    assert len(str(error.value).splitlines()) <= 3


def test_a_place_that_is_not_of_this_loader() -> None:
    place = stream(shuffled())
    seen(place, 0, 2)
    with pytest.raises(ValueError, match="--seed 0, and this run has --seed 1\nWay out: --seed 0"):
        stream(shuffled(), seed=1).batches_before(place.place(2))
    with pytest.raises(ValueError, match="ended after 1 batches, and the checkpoint was made after 2 of a pass"):
        stream([torch.zeros(1)]).batches_before(place.place(2))
    text = TokenStream(byte_tokens(bytes(60)), 2, 10)
    with pytest.raises(ValueError, match="no place in batches, and --data own.py:loader is a loader\nWay out: --data"):
        stream([]).batches_before(text.place(1))
    with pytest.raises(ValueError, match="no place in a text.*\nWay out: --data with what the run was started with"):
        text.batches_before(place.place(2))
