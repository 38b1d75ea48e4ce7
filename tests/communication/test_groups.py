"""Collectives over merged axes and parts of one, on four real gloo processes; and what a lost peer looks like."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from autopar.communication.communicator import Communicator
from autopar.communication.connect import connect
from autopar.communication.groups import agreement_group
from autopar.errors import LaunchError, RankFailedError
from autopar.ir.traffic import Transfer, moved_bytes
from autopar.mesh import Mesh
from autopar.simulator.lockstep import collective
from tests.launch import run_ranks, try_ranks
from tests.traffic import sent_since

CPU = torch.device("cpu")
PLACES = (  # mesh, groups
    (Mesh(dp=2, sp=2), ("dp+sp",)),
    (Mesh(sp=4), ("sp:inner2", "sp:outer2")),
    (Mesh(sp=2, tp=2), ("sp+tp",)),
)


def part(shape: tuple[int, ...], rank: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def cases(ways: int) -> list[tuple[str, tuple[int, ...], tuple[Any, ...]]]:
    """(collective, shape of a part, arguments after the axis); parts are uneven where they may be."""
    where, long = (ways, 0, 1, [1], 3 * ways - 1), (3 * ways - 1, 2)
    found: list[Any] = [(name, (3, 2), where) for name in ("all_gather", "all_gather_invariant", "pad")]
    found += [(name, long, where) for name in ("reduce_scatter", "split", "split_replicated")]
    found += [("all_reduce", (3, 2), (op,)) for op in ("sum", "max", "min")]
    found += [(name, (3, 2), ()) for name in ("enter", "release", "keep_first")]
    found += [("shift", (3, 2), (ways, by)) for by in (1, -1)]
    found += [("reorder", (6, 2), (ways, [0, 1, 1], [0, -2, 1]))]
    return [*found, ("all_to_all", (3, 2 * ways), (ways, [0, 1, 1], [1, 1, 1]))]


def run_cases(mesh: Mesh, axes: tuple[str, ...]) -> list[Any]:
    comm = connect(mesh, 60.0, CPU).comm
    found: list[Any] = []
    for axis in axes:
        comm.open([axis])
        for name, shape, arguments in cases(mesh.size(axis)):
            before = comm.traffic
            result = getattr(comm, name)(part(shape, comm.rank), axis, *arguments)
            found.append((result, sent_since(before, comm.traffic)))
        found.append((comm.axis_index(axis), []))
    return found


@pytest.mark.parametrize(("mesh", "axes"), PLACES, ids=["dp+sp", "parts of sp", "sp+tp"])
def test_collectives_equal_the_simulators(mesh: Mesh, axes: tuple[str, ...]) -> None:
    for rank, found in enumerate(run_ranks(run_cases, 4, mesh, axes)):
        results = iter(found)
        for axis in axes:
            group, ways = mesh.group(rank, axis), mesh.size(axis)
            for name, shape, arguments in cases(ways):
                parts = [part(shape, peer) for peer in group]
                result, sent = next(results)
                expected = collective(name, parts, (axis, *arguments))[group.index(rank)]
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
                count = moved_bytes(name, ways, parts[0].numel() * 8)
                if name != "reduce_scatter":  # padding travels too
                    assert sent == ([Transfer("forward", axis, name, 1, count)] if count else []), (name, sent)
            assert int(next(results)[0]) == group.index(rank)


STARTS: dict[str, Callable[[Communicator, Tensor, str, int], Tensor]] = {
    "all_reduce": lambda comm, x, axis, ways: comm.start_all_reduce(x, axis),
    "all_gather": lambda comm, x, axis, ways: comm.start_all_gather(x, axis, ways, 0, length=ways * len(x)),
    "reduce_scatter": lambda comm, x, axis, ways: comm.start_reduce_scatter(x, axis, ways, 0, length=len(x)),
    "shift": lambda comm, x, axis, ways: comm.start_shift(x, axis, ways, 1),
}


def expected(name: str, each: list[float], position: int, rows: int) -> Tensor:
    """What the rank at ``position`` has in the end, where that at i begins with ``rows`` rows of ``each[i]``."""
    if name == "all_gather":
        return torch.cat([torch.full((rows, 16), x) for x in each])
    if name == "shift":
        return torch.full((rows, 16), each[position - 1])
    return torch.full((rows // (len(each) if name == "reduce_scatter" else 1), 16), sum(each))


def keep_fifty_under_way(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Wrong results of fifty of each collective, over all ``axes`` in turn, started before the first is waited for."""
    comm = connect(mesh, 60.0, CPU).comm
    comm.open(axes)
    wrong = 0
    for name, start in STARTS.items():
        under_way = []
        for number in range(50):
            axis, rows = axes[number % len(axes)], 4 * (1 + number % 5 * 20)
            each, position = [float(number + 1000 * i) for i in range(mesh.size(axis))], comm.position(axis)
            started = start(comm, torch.full((rows, 16), each[position]), axis, len(each))
            under_way.append((started, axis, expected(name, each, position, rows)))
        wrong += sum(not torch.equal(comm.wait(started, axis), right) for started, axis, right in under_way)
    return wrong


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [(Mesh(dp=2, sp=2), ("dp+sp", "dp", "sp")), (Mesh(sp=4), ("sp:inner2", "sp:outer2", "sp"))],
    ids=["dp+sp", "parts of sp"],
)
def test_fifty_under_way(mesh: Mesh, axes: tuple[str, ...]) -> None:
    assert run_ranks(keep_fifty_under_way, 4, mesh, axes) == [0] * 4


def groups_made(mesh: Mesh) -> tuple[list[int], list[list[int]]]:
    """The number of process groups before and after, and the ranks of those of some names."""
    comm = connect(mesh, 60.0, CPU).comm
    counts = [len(distributed_c10d._world.pg_names)]
    for axes in (("dp+sp", "sp:inner2"), ("dp+sp",), ("dp", "tp", "ep")):
        comm.open(axes)
        counts.append(len(distributed_c10d._world.pg_names))
    world = torch.distributed.group.WORLD
    assert comm._groups["dp+sp"] is world and comm._groups["tp"] is comm._groups["ep"] is None
    torch.distributed.barrier()  # making a group ends on each rank when that has its own connections
    torch.distributed.destroy_process_group()
    return counts, [[len(distributed_c10d._world.pg_names)]]


def test_groups_are_made_once_and_end_with_the_others() -> None:
    """All ranks of the world need no new group; two parts of ``sp`` make one on each rank.

    Before there are the world's, those of the two axes, and that by which ranks agree on what they do.
    """
    assert run_ranks(groups_made, 8, Mesh(dp=2, sp=4)) == [([4, 5, 5, 5], [[0]])] * 8


def make_the_groups_of_one_stage(mesh: Mesh) -> float:
    """Only the ranks of the second stage need a group over two axes: the others do not wait."""
    comm = connect(mesh, 60.0, CPU).comm
    if comm.coordinates["pp"] == 0:
        return 0.0
    return float(comm.all_reduce(torch.tensor(float(comm.rank)), "dp+sp"))


def test_ranks_outside_of_a_group_take_no_part_in_making_it() -> None:
    found = run_ranks(make_the_groups_of_one_stage, 8, Mesh(pp=2, dp=2, sp=2), timeout=60.0)
    assert found == [0.0] * 4 + [22.0] * 4


def bind_the_world_to_a_device(mesh: Mesh) -> tuple[bool, float]:
    """As ``init_process_group(device_id=...)`` does: then new groups are split off, which takes all ranks."""
    comm = connect(mesh, 60.0, CPU).comm
    world = torch.distributed.group.WORLD
    assert world is not None
    world.bound_device_id = torch.device("cuda", 0)
    comm.open(["sp:inner2"])
    bound, world.bound_device_id = world.bound_device_id, None
    return bound == torch.device("cuda", 0), float(comm.all_reduce(torch.tensor(float(comm.rank)), "sp:inner2"))


def test_a_group_is_not_split_off_a_world_that_is_bound_to_a_device() -> None:
    found = run_ranks(bind_the_world_to_a_device, 4, Mesh(sp=4))
    assert found == [(True, 1.0), (True, 1.0), (True, 5.0), (True, 5.0)]


def lose_a_peer(victim: int) -> str:
    comm = connect(Mesh(dp=2, sp=2), 15.0, CPU).comm
    comm.all_reduce(torch.ones(4), "dp+sp")
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            comm.all_reduce(torch.ones(4), "dp+sp")
    except RankFailedError as problem:
        return str(problem)


@pytest.mark.slow
def test_a_lost_peer_is_named_with_the_merged_axis() -> None:
    results = try_ranks(lose_a_peer, 4, 2, timeout=120.0)
    assert results[2] is None
    for rank in (0, 1, 3):
        others = ", ".join(str(peer) for peer in range(4) if peer != rank)
        assert f"rank {rank} waited in all_reduce over axis 'dp+sp' for ranks {others}" in results[rank]
        assert len(results[rank].splitlines()) < 15


def stay_away_from_a_group(absent: int) -> str:
    comm = connect(Mesh(sp=4), 2.0, CPU).comm
    if comm.rank == absent:
        return "absent"
    try:
        comm.open(["sp:inner2"])
        comm.all_reduce(torch.ones(4), "sp:inner2")
    except RankFailedError as problem:
        return str(problem)
    return "made"


def test_a_member_that_does_not_come_to_a_new_group() -> None:
    results = run_ranks(stay_away_from_a_group, 4, 3, timeout=120.0)
    assert results[:2] == ["made", "made"] and results[3] == "absent"
    assert "over axis 'sp:inner2' for rank 3" in results[2] or "group of axis 'sp:inner2' for rank 3" in results[2]


def test_torch_that_sorts_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_group(ranks: Any, timeout: Any, backend: Any, use_local_synchronization: bool = False) -> None:
        """As in torch 2.11."""

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    assert agreement_group([0, 1, 2], 60.0) is None  # what the function above gives
    with pytest.raises(LaunchError, match=r"sorts the ranks of a process group, and these are \[2, 0\]"):
        agreement_group([2, 0], 60.0)
