"""The ranks of one launch compile once, whatever happens to the one that does, and compute what they would without."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

import autopar
from autopar import AutoparError, Mesh, Plan
from autopar.cache import between_machines, compiled
from autopar.cache.between_machines import PIECE, Delivery
from autopar.cache.key import Request
from autopar.compiler import compile_program
from tests.launch import run_ranks, try_ranks

RANKS = 3
FEW = 2  # where nothing but sharing is looked at
ALONE = "each is a launch of its own"
DIES, FAILS, OWN = "the first to compile is killed", "compiling fails", "each rank has another model"


class Net(nn.Module):
    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.up, self.down, self.number = nn.Linear(6, 12), nn.Linear(12, 6), number

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).square().mean() + self.number


def compiling(folder: Path, what: str) -> Any:
    """The compiler, slow enough that the other ranks come and wait."""

    def run(*args: Any) -> Any:
        if what == DIES and not (folder / "died").exists():
            (folder / "died").touch()
            os._exit(9)
        time.sleep(0.5)
        if what == FAILS:
            raise AutoparError("it cannot be split")
        return compile_program(*args)

    return mock.patch.object(compiled, "compile_program", side_effect=run)


def trained(folder: str) -> Any:
    """On each rank: how often it compiled, the losses, and the text of its program."""
    os.environ["AUTOPAR_CACHE"] = folder
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 6, dtype=torch.float64)
    with compiling(Path(folder), "") as counted:
        parallel = autopar.parallelize(model, Mesh(dp=FEW), example_inputs=(x,))
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        losses = []
        for _ in range(2):
            losses.append(parallel.train_step(x).item())
            optimizer.step()
            optimizer.zero_grad()
    return counted.call_count, losses, str(parallel.program)


def test_they_compile_once_and_the_next_launch_not_at_all(tmp_path: Path) -> None:
    first, second = run_ranks(trained, FEW, str(tmp_path)), run_ranks(trained, FEW, str(tmp_path))
    assert [sum(count for count, *_ in ranks) for ranks in (first, second)] == [1, 0]
    assert [rest for _, *rest in first] == [rest for _, *rest in second]


@pytest.mark.slow
def test_they_compute_what_they_do_without(tmp_path: Path) -> None:
    without, shared = run_ranks(trained, FEW, "0"), run_ranks(trained, FEW, str(tmp_path))
    assert [count for count, *_ in without] == [1] * FEW
    assert [rest for _, *rest in without] == [rest for _, *rest in shared]


def prepared(folder: str, what: str) -> tuple[int, str]:
    """On each rank, which knows nothing of the others: how often it compiled, and its program or the error."""
    os.environ["AUTOPAR_CACHE"] = folder
    torch.manual_seed(0)
    if what == ALONE:
        del os.environ["RANK"]
    model = Net(int(os.environ["RANK"]) if what == OWN else 0)
    with compiling(Path(folder), what) as counted:
        try:
            text = str(compiled.cached_program(Request(model, Mesh(dp=3), Plan(), (torch.ones(6, 6),), {}))[0])
        except AutoparError as error:
            text = str(error)
    return counted.call_count, text


@pytest.mark.slow
def test_another_compiles_where_the_first_is_killed(tmp_path: Path) -> None:
    found = try_ranks(prepared, RANKS, str(tmp_path), DIES)
    alive = [result for result in found if isinstance(result, tuple)]
    assert len(alive) == RANKS - 1
    assert sorted(count for count, _ in alive) == [0, 1]
    assert len({text for _, text in alive}) == 1


@pytest.mark.slow
def test_launches_at_the_same_time_compile_once(tmp_path: Path) -> None:
    found = run_ranks(prepared, RANKS, str(tmp_path), ALONE)
    assert sum(count for count, _ in found) == 1
    assert len({text for _, text in found}) == 1


@pytest.mark.slow
def test_a_failure_is_that_of_every_rank(tmp_path: Path) -> None:
    assert run_ranks(prepared, RANKS, str(tmp_path), FAILS) == [(1, "it cannot be split")] * RANKS


@pytest.mark.slow
def test_ranks_whose_models_differ_do_not_share(tmp_path: Path) -> None:
    found = run_ranks(prepared, RANKS, str(tmp_path), OWN)
    assert [count for count, _ in found] == [1] * RANKS
    assert len({text for _, text in found}) == RANKS


@pytest.mark.slow
def test_they_share_where_there_can_be_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = run_ranks(prepared, RANKS, str(tmp_path / "file" / "cache"), "")
    assert sum(count for count, _ in found) == 1
    assert len({text for _, text in found}) == 1


# ---------------------------------------------------------------- machines with folders of their own


def on_machines(folder: str, what: str, size: int = PIECE) -> tuple[int, list[Any], int]:
    """On each rank, as if it were a machine of its own: how often it compiled, its losses or the error, its entries."""
    own = Path(folder, os.environ["RANK"])
    os.environ["AUTOPAR_CACHE"] = str(own)
    torch.manual_seed(0)
    model = Net(int(os.environ["RANK"]) if what == OWN else 0).double()
    x = torch.randn(6, 6, dtype=torch.float64)
    losses: list[Any] = []
    with compiling(Path(folder), what) as counted, mock.patch.object(between_machines, "PIECE", size):
        try:
            parallel = autopar.parallelize(model, Mesh(dp=FEW))
            losses = [parallel.train_step(x).item() for _ in range(2)]
        except AutoparError as error:
            losses = [str(error).splitlines()[0]]
    return counted.call_count, losses, len(list(own.glob("*.program")))


def test_one_machine_compiles_and_the_other_gets_it(tmp_path: Path) -> None:
    found = run_ranks(on_machines, FEW, str(tmp_path), "", 1000)
    assert sorted(count for count, *_ in found) == [0, 1]
    assert [entries for *_, entries in found] == [1, 1]
    assert found[0][1] == found[1][1]
    again = run_ranks(on_machines, FEW, str(tmp_path), "")
    assert [count for count, *_ in again] == [0, 0]


@pytest.mark.slow
def test_what_does_not_serve_another_machine_is_compiled_there(tmp_path: Path) -> None:
    found = run_ranks(on_machines, FEW, str(tmp_path), OWN)
    assert [count for count, *_ in found] == [1, 1]
    assert {losses[0] for _, losses, _ in found} == {"the ranks have made different programs of this call"}


@pytest.mark.slow
def test_a_failure_is_that_of_every_machine(tmp_path: Path) -> None:
    found = run_ranks(on_machines, FEW, str(tmp_path), FAILS)
    assert found == [(1, ["it cannot be split"], 0)] * FEW


def test_what_no_other_machine_gives_is_compiled_after_the_longest_wait() -> None:
    store = HashStore()
    first, second, third = (Delivery("key", store) for _ in range(3))
    assert (first.is_mine, second.is_mine, third.is_mine) == (True, False, False)
    assert second.taken(0.01) == []
    first.give([b"name", b"", b"rest"])
    assert third.taken(0.01) == [b"name", b"", b"rest"]
