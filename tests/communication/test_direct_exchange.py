"""Messages in place of gloo's rings: what they compute, when they are chosen, what torch counts."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopar import Mesh
from autopar.communication import direct_exchange, functional_collectives
from autopar.communication.connect import connect
from tests.dispatched import Dispatched
from tests.launch import run_ranks
from tests.selection import slow_but

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]
COLLECTIVES: dict[str, Collective] = {
    "sum": lambda x, group: functional_collectives.all_reduce(x, group, "sum"),
    "sum in place": lambda x, group: functional_collectives.all_reduce(x.clone(), group, "sum", in_place=True),
    "max": lambda x, group: functional_collectives.all_reduce(x, group, "max"),
    "scatter": functional_collectives.reduce_scatter,
    "gather": functional_collectives.all_gather,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)
# elements: a scalar; one row; a small sum; one that two exchanges do; one for a ring; none
SHAPES = ((), (1, 12), (12, 5), (12, 3000), (12, 30_000), (0, 4))


def given(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
    numbers = torch.arange(math.prod(shape)).add_(rank).remainder_(2 if dtype is torch.bool else 9)
    return numbers.view(shape).to(dtype)


def expected(name: str, inputs: list[Tensor], rank: int) -> Tensor:
    """Whole numbers are summed without rounding."""
    if name == "gather":
        return torch.cat(inputs)
    stacked = torch.stack(inputs)
    if name == "max":
        return stacked.amax(0)
    whole = stacked.sum(0, dtype=stacked.dtype)
    return whole.chunk(len(inputs))[rank] if name == "scatter" else whole


def wrong_results(size: int) -> list[str]:
    comm = connect(Mesh(dp=size), 60.0, torch.device("cpu")).comm
    group, wrong = comm._groups["dp"], []
    assert group is not None
    for name, dtype, shape in itertools.product(COLLECTIVES, DTYPES, SHAPES):
        is_sum = name in ("sum", "sum in place", "max")
        if (dtype is torch.bool and is_sum) or (not is_sum and not (shape and shape[0])):
            continue
        if name == "scatter" and (dtype is torch.bool or shape[0] % size):
            continue
        inputs = [given(shape, dtype, rank) for rank in range(size)]
        own = inputs[comm.rank]
        if is_sum and len(shape) == 2:
            own = own.t().contiguous().t()
        before = own.clone()
        found, right = COLLECTIVES[name](own, group), expected(name, inputs, comm.rank)
        if not (torch.equal(found, right) and found.dtype == dtype and torch.equal(own, before)):
            wrong.append(f"{name} {dtype} {shape}")
    assert not direct_exchange._pending
    return wrong


def sums_of_thirds(size: int) -> tuple[list[str], list[bytes], dict[str, int]]:
    """What was wrong; the bytes of sums that have to be rounded; what torch counts of these."""
    wrong = wrong_results(size)
    group, found = dist.group.WORLD, []
    assert group is not None
    with Dispatched() as counter:
        for length in (4, 120_000, 4_000_000):
            x = torch.full((length,), (group.rank() + 1) / 3)
            started = functional_collectives.start_all_reduce(x, group, "sum")
            found.append(functional_collectives.wait(started)[-1:].numpy().tobytes())
    return wrong, found, dict(counter.times)


@pytest.mark.parametrize("size", slow_but([1], [2, 4, 3]))
def test_every_form_is_right_and_alike_on_all_ranks(size: int) -> None:
    (wrong, first, counted), *others = run_ranks(sums_of_thirds, size, size)
    assert not wrong and not any(problems for problems, *_ in others), wrong
    assert all(bits == first for _, bits, _ in others)
    rings = 2 if size == 2 else 1  # the first is one message to each; the second is two, or a ring
    assert counted["all_reduce"] == rings and counted["send"] == counted["recv"] == (size - 1) * (5 - 2 * rings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_small_sum_does_not_depend_on_vectors_and_threads(dtype: torch.dtype) -> None:
    """Each rank makes it: one whose vectors, or parts of threads, end elsewhere has to have the same."""
    rows = torch.randn(8, 1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)

    def added(part: Tensor) -> Tensor:
        found = part.new_empty(part.shape[1])
        direct_exchange._reduced(list(part), "sum", found)
        return found

    whole = added(rows)
    assert all(torch.equal(whole[:end], added(rows[:, :end].contiguous())) for end in range(1, 1001, 7))
    exact = rows.double().sum(0)
    assert (whole.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    if dtype is torch.float64:
        assert any(not torch.equal(rows.sum(0)[:end], rows[:, :end].contiguous().sum(0)) for end in range(1, 1001, 7))


def test_what_nobody_waits_for_is_given_back() -> None:
    """A step that fails after the start of a collective holds no memory by it."""
    nothing = direct_exchange._Messages([], timedelta(seconds=1), lambda: None)
    result = direct_exchange._later(torch.empty(3), lambda out: out.fill_(2.0), nothing)
    lost = direct_exchange._later(torch.empty(3), lambda out: out.fill_(3.0), nothing)
    assert len(direct_exchange._pending) == 2
    del lost
    assert list(direct_exchange._pending) == [result.data_ptr()] and len(direct_exchange._abandoned) == 1
    assert direct_exchange.finish(result) and torch.equal(result, torch.full((3,), 2.0))
    assert not direct_exchange._pending and not direct_exchange.finish(result)
    direct_exchange._abandoned.clear()


def stopped_steps() -> list[Any]:
    """Of a step that is stopped when messages are under way: how many hold memory, and the next result."""
    comm = connect(Mesh(dp=2), 60.0, torch.device("cpu")).comm
    group, mine = comm._groups["dp"], torch.full((50_000,), float(comm.rank))
    assert group is not None
    found: list[Any] = []
    for step in range(3):
        time.sleep(0.1 * (comm.rank == step % 2))
        for start in (functional_collectives.start_all_gather, functional_collectives.start_reduce_scatter):
            start(mine, group)
        found.append(len(direct_exchange._abandoned))
        found.append(functional_collectives.all_gather(mine, group).view(2, -1)[:, [0, -1]].tolist())
        found.append(len(direct_exchange._abandoned))
    return found


def test_memory_that_messages_write_to_stays_until_they_have_come() -> None:
    """Where forward is stopped after the start of a collective, what comes would be written to memory of others."""
    for found in run_ranks(stopped_steps, 2):
        assert found == [1, [[0.0, 0.0], [1.0, 1.0]], 0] * 3  # the second has waited for the first


class Failing:
    def wait(self, timeout: timedelta) -> None:
        raise RuntimeError(f"Connection closed by peer after {timeout.seconds}")


def after_the_group_is_destroyed() -> tuple[int, list[float]]:
    """One rank starts what the others do not, before another group is made."""
    comm = connect(Mesh(dp=2), 60.0, torch.device("cpu")).comm
    rank, group = comm.rank, dist.group.WORLD
    assert group is not None
    failing = direct_exchange._Messages([Failing()], timedelta(seconds=7), lambda: group)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="after 7"):
        failing.give_up()  # of a group that is there
    again = dist.new_group([0, 1])
    assert again is not None
    if rank == 0:
        direct_exchange.start_reduce_scatter(torch.ones(2), again)
    number = len(direct_exchange._abandoned)
    dist.destroy_process_group(again)
    return number, functional_collectives.all_gather(torch.full((1,), float(rank)), group).tolist()


def test_messages_of_a_group_that_was_destroyed_are_given_up() -> None:
    assert run_ranks(after_the_group_is_destroyed, 2) == [(1, [0.0, 1.0]), (0, [0.0, 1.0])]


def kept_after(collectives: int) -> int:
    """Objects that Python holds more than before, numbers too."""
    group = connect(Mesh(dp=2), 60.0, torch.device("cpu")).comm._groups["dp"]
    assert group is not None

    def held() -> int:
        for _ in range(collectives):
            functional_collectives.all_reduce(torch.ones(4), group, "sum")
        gc.collect()
        return sys.getallocatedblocks()

    held()
    return held() - held()


def test_a_message_leaves_nothing_behind() -> None:
    """The numbers of messages were kept: 40 bytes for each collective, 4 GB in a million steps of a hundred."""
    assert max(abs(kept) for kept in run_ranks(kept_after, 2, 500)) < 100


def test_choices() -> None:
    """More ranks save more rounds; large tensors go around the ring, where nothing is sent or copied more."""
    for chooses, most in (
        (direct_exchange.sums_small, 1e6),
        (direct_exchange.sums_in_two, 4e6),
    ):
        for ways in (2, 3, 4, 8, 64):
            found = [chooses(ways, int(size)) for size in (4, most / 64, most, 64 * most)]
            assert found == sorted(found, reverse=True), (chooses, ways)
            assert not chooses(ways, 2**33)
    assert not direct_exchange.sums_in_two(2, 4), "a ring of two is two rounds"
    assert all(direct_exchange.sums_small(ways, 8) for ways in (2, 3, 4, 64))
