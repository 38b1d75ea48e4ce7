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

import autopar
from autopar import AutoparError, Mesh, Plan
from autopar.cache import compiled
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
