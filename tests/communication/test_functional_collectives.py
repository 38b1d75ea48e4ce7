"""Fifty of each collective under way at once on real gloo ranks: every result is right, and no memory is written twice.

torch 2.13's functional ``all_gather_into_tensor`` fails this (see ``functional_collectives``): the process dies, or
hangs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autopar import Mesh
from autopar.communication import functional_collectives as torch_collectives
from autopar.communication.connect import connect
from tests.launch import run_ranks

UNDER_WAY, WIDTH = 50, 96
Start = Callable[[Tensor, torch.distributed.ProcessGroup], Tensor]

STARTS: dict[str, Start] = {
    "all_gather": torch_collectives.start_all_gather,
    "all_gather_into": lambda x, group: torch_collectives.start_all_gather_into(
        x, group, x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    ),
    "all_reduce": lambda x, group: torch_collectives.start_all_reduce(x, group, "sum", in_place=bool(x[0, 0] % 2)),
    "reduce_scatter": torch_collectives.start_reduce_scatter,
    "shift": lambda x, group: torch_collectives.start_shift(x, group, 1),
}


def rows(number: int) -> int:
    return 2 * (8 + number % 5 * 50)  # unequal sizes, so that memory given back is handed out again elsewhere


def expected(name: str, number: int, turn: int, rank: int, ranks: int) -> Tensor:
    """What this rank has in the end: rank r begins with ``number + turn + 1000 * r`` everywhere."""
    each = [float(number + turn + 1000 * r) for r in range(ranks)]
    if name.startswith("all_gather"):
        return torch.cat([torch.full((rows(number), WIDTH), x) for x in each])
    if name == "shift":
        return torch.full((rows(number), WIDTH), each[rank - 1])
    return torch.full((rows(number) // (ranks if name == "reduce_scatter" else 1), WIDTH), sum(each))


def keep_many_under_way(name: str, turns: int) -> int:
    """Wrong results in so many turns, each of which starts fifty and waits for them while it computes."""
    comm = connect(Mesh(dp=2), 60.0, torch.device("cpu")).comm
    group, wrong = comm._groups["dp"], 0
    work = torch.randn(64, 64)
    for turn in range(turns):
        given = [torch.full((rows(n), WIDTH), float(n + turn + 1000 * comm.rank)) for n in range(UNDER_WAY)]
        started = [STARTS[name](x, group) for x in given]
        for number in range(UNDER_WAY):
            found = torch_collectives.wait(started[number])
            wrong += not torch.equal(found, expected(name, number, turn, comm.rank, 2))
            started[number] = given[number] = torch.empty(0)
            torch.nn.functional.silu(work @ work).sum()
    return wrong


@pytest.mark.parametrize("turns", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STARTS)
def test_fifty_under_way(name: str, turns: int) -> None:
    assert run_ranks(keep_many_under_way, 2, name, turns, timeout=500) == [0, 0]
