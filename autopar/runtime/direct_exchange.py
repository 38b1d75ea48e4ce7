"""Collectives of gloo in one or two exchanges of all ranks with all, where that takes less time than a ring.

gloo passes tensors around a ring: a sum takes 2 (n - 1) messages one after the other, a gather n - 1, and torch's
reduce-scatter on gloo is a whole sum, of which a rank keeps its part. Between processes that share cores, or machines
on a plain network, the rounds are what takes the time. Here each rank sends every other one what it is to have, at once
(Thakur, Rabenseifner and Gropp 2005, Optimization of Collective Communication Operations in MPICH, sections 3 and 4):

    reduce-scatter   every part to the rank that has it in the end, which adds up what came; always
    all-gather       a rank's own part to all others; where copying it n times takes less than the rounds
    all-reduce       of a small tensor: all of it to all others, each of which adds up: (n - 1) bytes sent for each, in
                     place of 2 (n - 1) / n; of a larger one a reduce-scatter and an all-gather

All ranks have the same bit for bit: a part is added up on one rank, and a small sum in the order of the ranks, which on
none depends on its processor or threads. Bytes are those of a ring, except for small sums. The choice depends on sizes
alone, so that all ranks make the same one. Constants are measured: gloo, 2 and 4 processes on two cores
(benchmarks/README.md, peers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

ROUND = 0.25e-3  # seconds of a message that others wait for
SENT = 0.5e9  # bytes per second to another process
COPIED = 4e9  # bytes per second of a copy, or of a sum
EXCHANGED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)
HALVES = (torch.bfloat16, torch.float16)
SUMS: dict[str, Callable[..., Any]] = {
    "sum": lambda rows, out: torch.sum(rows, 0, dtype=out.dtype, out=out),
    "max": lambda rows, out: torch.amax(rows, 0, out=out),
}

_all_to_all: Any = torch.ops._c10d_functional.all_to_all_single.default
_wait: Any = torch.ops._c10d_functional.wait_tensor.default
_all_to_all_into: Callable[..., Any] = dist.all_to_all_single
# address of a result -> it, while anybody has it, and what gives it its values
_pending: dict[int, tuple[ref[Tensor], Callable[[Tensor], object]]] = {}


def is_possible(x: Tensor, group: ProcessGroup) -> bool:
    """Whether ``x`` travels by gloo, which takes its dtype."""
    return x.device.type == "cpu" and x.dtype in EXCHANGED and x.numel() > 0 and "gloo" in dist.get_backend(group)


def gathers(ways: int, size: int) -> bool:
    """Whether a gather of ``size`` bytes in all is one exchange: it copies as many bytes as it saves rounds."""
    return size / COPIED <= (ways - 1) * ROUND


def sums_small(ways: int, size: int) -> bool:
    """Whether a sum of ``size`` bytes is one exchange of all: it sends more, and saves all rounds but one."""
    if ways == 2:
        return False  # a ring of two takes as long: measured
    more = size * (ways - 1) * (ways - 2) / ways / SENT + 2 * size * ways / COPIED
    return more <= (2 * ways - 3) * ROUND


def sums_in_two(ways: int, size: int) -> bool:
    """Whether a sum of ``size`` bytes is two exchanges: it copies more, and saves all rounds but two."""
    return ways > 2 and 4 * size / COPIED <= (2 * ways - 4) * ROUND


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...): this rank's part of the sum of (ranks * n, ...) of each rank, after :func:`finish`."""
    ways = group.size()
    own = x.new_empty((x.shape[0] // ways, *x.shape[1:]))
    received = _exchanged(x.detach(), group)
    return _later(own, lambda out: SUMS["sum"](_wait(received).view(ways, *out.shape), out=out))


def start_all_gather_into(x: Tensor, group: ProcessGroup, out: Tensor) -> Any:
    """The work that writes the parts ``x`` of all ranks to ``out``, of which ``x`` may be this rank's part."""
    return _all_to_all_into(out, torch.cat([x.detach()] * group.size()), group=group, async_op=True)


def start_all_reduce(x: Tensor, group: ProcessGroup, op: str) -> Tensor | None:
    """The sum, or maximum, of ``x`` of all ranks, after :func:`finish`; None where that is better done by a ring."""
    ways, size = group.size(), x.numel() * x.element_size()
    if op not in SUMS:
        return None
    if sums_small(ways, size):
        found = torch.empty(x.shape, dtype=x.dtype)
        received = _exchanged(x.detach().reshape(-1).repeat(ways), group)
        of_rows = _in_order if op == "sum" else SUMS[op]
        return _later(found, lambda out: of_rows(_wait(received).view(ways, *out.shape), out=out))
    if x.numel() % ways == 0 and sums_in_two(ways, size):
        found = torch.empty(x.shape, dtype=x.dtype)
        received = _exchanged(x.detach().reshape(-1), group)

        def finish(out: Tensor) -> None:
            rows = out.view(ways, -1)
            own = SUMS[op](_wait(received).view_as(rows), out=rows.new_empty(rows.shape[1]))
            start_all_gather_into(own, group, out.view(-1)).wait()

        return _later(found, finish)
    return None


def finish(x: Tensor) -> bool:
    """Wait for ``x``, a result of one of the functions ``start_...`` of this module; False where it is none."""
    if not _pending:
        return False
    _, complete = _pending.pop(x.data_ptr(), (None, None))
    if complete is None:
        return False
    complete(x)
    return True


def _in_order(rows: Tensor, out: Tensor) -> Tensor:
    """The sum of ``rows``, one after the other. That of torch has, from five rows on, another order for the last few
    elements, as many as vectors of this processor do not fill, and for those where the part of a thread ends."""
    total = rows[0].to(torch.float32 if out.dtype in HALVES else out.dtype, copy=True)
    for row in rows[1:]:
        total.add_(row)
    return out.copy_(total)


def _exchanged(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part i of ``x`` along dim 0 to rank i; part i of the result is from it."""
    sizes = [x.shape[0] // group.size()] * group.size()
    result: Tensor = _all_to_all(x, sizes, sizes, group.group_name)
    return result


def _later(result: Tensor, complete: Callable[[Tensor], object]) -> Tensor:
    """``result``, which has its values once :func:`finish` has called ``complete`` with it.

    Where nobody waits for it any more (a step has failed), it and what it waits for are given back with its last user,
    before another tensor has its address.
    """
    address = result.data_ptr()
    _pending[address] = ref(result, lambda _: _pending.pop(address, None)), complete
    return result
