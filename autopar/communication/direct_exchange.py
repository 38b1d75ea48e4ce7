"""Collectives of gloo as messages of all ranks to all, at once.

gloo passes tensors around a ring: a sum takes 2 (n - 1) messages one after the other, a gather n - 1; torch's
reduce-scatter on gloo is a whole sum, of which a rank keeps its part, and its gathers and exchanges copy what they send
and what they get. Between processes that share cores, or machines on a plain network, rounds and copies are what takes
the time. Here each rank sends every other one what it is to have (Thakur, Rabenseifner and Gropp 2005, Optimization of
Collective Communication Operations in MPICH, sections 3 and 4), from where it lies to where it belongs:

    all-gather       a rank's own part to all others
    all-to-all       each other rank's block to it; a shift is one of them
    reduce-scatter   every part to the rank that has it in the end, which adds up what came
    all-reduce       of a small tensor: all of it to all others, each of which adds up: (n - 1) bytes sent for each, in
                     place of 2 (n - 1) / n; of a larger one a reduce-scatter and an all-gather; of a large one the ring

All ranks have the same bit for bit: a part is added up on one rank, and a small sum in the order of the ranks, which on
none depends on its processor or threads. Bytes are those of a ring, except for small sums. The choice depends on sizes
alone, so that all ranks make the same one. Constants are measured: gloo, 2 and 4 processes on two cores
(benchmarks/README.md, peers).

The messages of one collective have a number of their own, as gloo's collectives have: ranks that make other calls wait
for each other, and never take one tensor for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from autopar.communication.freed_memory import keep_freed
from autopar.communication.timeouts import timeout_of

ROUND = 0.25e-3  # seconds of a message that others wait for
SENT = 0.5e9  # bytes per second to another process
COPIED = 4e9  # bytes per second of a copy, or of a sum
SUMMED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)
HALVES = (torch.bfloat16, torch.float16)
FIRST_NUMBER = 1 << 30  # of messages: those of users, and of pipelines, begin with 0
NUMBERS = 1 << 30
LARGE = 1e6  # bytes of messages whose memory is that of the next step's too
UNDER_WAY = timedelta(seconds=1)  # for what peers have sent before a group was destroyed


@dataclass(frozen=True)
class _Messages:
    """Messages of one collective. A call waits for them."""

    works: Sequence[Work]
    timeout: timedelta
    group: Callable[[], ProcessGroup | None]  # None when nobody has it any more

    def __call__(self) -> None:
        self._wait(self.timeout)

    def give_up(self) -> None:
        """Wait for them where nobody wants what they bring: by all ranks, so that it has come or will.

        Not where the group was destroyed, as before another one is made: peers may have started nothing, and be gone.
        """
        if self._has_group():
            self()
            return
        with suppress(RuntimeError):
            self._wait(UNDER_WAY)

    def _has_group(self) -> bool:
        group = self.group()
        try:
            return group is not None and bool(dist.get_backend(group))
        except ValueError:  # destroyed, and somebody has it still
            return False

    def _wait(self, timeout: timedelta) -> None:
        for work in self.works:
            work.wait(timeout)


_numbers: WeakKeyDictionary[ProcessGroup, Iterator[int]] = WeakKeyDictionary()
# address of a result -> it, while anybody has it, and what gives it its values
_pending: dict[int, tuple[ref[Tensor], Callable[[Tensor], object]]] = {}
_abandoned: list[_Messages] = []  # what waits for messages of which nobody wants the result any more


def is_possible(x: Tensor, group: ProcessGroup) -> bool:
    """Whether ``x`` travels by gloo."""
    return x.device.type == "cpu" and "gloo" in dist.get_backend(group)


def sums_small(ways: int, size: int) -> bool:
    """Whether a sum of ``size`` bytes is one message to each: that may send more, and saves all rounds but one."""
    more = size * (ways - 1) * (ways - 2) / ways / SENT + 2 * size * ways / COPIED
    return more <= (2 * ways - 3) * ROUND


def sums_in_two(ways: int, size: int) -> bool:
    """Whether a sum of ``size`` bytes is two messages to each, which saves all rounds but two."""
    return ways > 2 and 4 * size / COPIED <= (2 * ways - 4) * ROUND


def start_all_gather_into(x: Tensor, group: ProcessGroup, out: Tensor) -> Tensor:
    """(n, ...) of each rank to ``out`` (ranks * n, ...), of which ``x`` may be this rank's part; see :func:`finish`."""
    parts = out.data.chunk(group.size()) if len(x) else [out.data] * group.size()
    mine = parts[group.rank()]
    if x.data_ptr() != mine.data_ptr():
        mine.copy_(x.data)
    wait = _started([mine] * group.size(), parts, group)
    return _later(out, lambda _: wait(), wait)


def start_exchange(x: Tensor, group: ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """``sent[i]`` rows of ``x`` to rank i; ``received[i]`` rows of the result are from it, after :func:`finish`."""
    found = torch.empty((sum(received), *x.shape[1:]), dtype=x.dtype)
    leaving, coming = torch.split(x.data, list(sent)), torch.split(found.data, list(received))
    coming[group.rank()].copy_(leaving[group.rank()])
    wait = _started(leaving, coming, group)
    return _later(found, lambda _: wait(), wait)


def start_shift(x: Tensor, group: ProcessGroup, by: int) -> Tensor:
    """``x`` of the rank ``by`` before, in exchange for this rank's to that ``by`` further, after :func:`finish`."""
    ways, rank = group.size(), group.rank()
    found, nothing = torch.empty(x.shape, dtype=x.dtype), x.data.view(-1)[:0]
    sent, received = ([nothing] * ways for _ in range(2))
    sent[(rank + by) % ways], received[(rank - by) % ways] = x.data, found.data
    wait = _started(sent, received, group)
    return _later(found, lambda _: wait(), wait)


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...): this rank's part of the sum of (ranks * n, ...) of each rank, after :func:`finish`."""
    parts = x.data.contiguous().chunk(group.size())
    arrived, rows = _of_all(parts, group)

    def complete(out: Tensor) -> None:
        arrived()
        _reduced(rows, "sum", out)

    return _later(torch.empty(parts[0].shape, dtype=x.dtype), complete, arrived)


def start_all_reduce(x: Tensor, group: ProcessGroup, op: str) -> Tensor | None:
    """The sum, or maximum, of ``x`` of all ranks, after :func:`finish`; None where that is better done by a ring."""
    ways, size = group.size(), x.numel() * x.element_size()
    if op not in ("sum", "max") or x.dtype not in SUMMED or not size:
        return None
    if sums_small(ways, size):
        arrived, rows = _of_all([x.data.contiguous()] * ways, group)

        def complete(out: Tensor) -> None:
            arrived()
            _reduced(rows, op, out)

    elif x.numel() % ways == 0 and sums_in_two(ways, size):
        arrived, rows = _of_all(x.data.reshape(-1).chunk(ways), group)

        def complete(out: Tensor) -> None:
            arrived()
            parts = out.view(-1).chunk(ways)
            own = parts[group.rank()]
            _reduced(rows, op, own)
            _started([own] * ways, parts, group)()

    else:
        return None
    return _later(torch.empty(x.shape, dtype=x.dtype), complete, arrived)


def finish(x: Tensor) -> bool:
    """Wait for ``x``, a result of one of the functions ``start_...`` of this module; False where it is none."""
    if not _pending:
        return False
    _, complete = _pending.pop(x.data_ptr(), (None, None))
    if complete is None:
        return False
    complete(x)
    return True


def _of_all(parts: Sequence[Tensor], group: ProcessGroup) -> tuple[_Messages, list[Tensor]]:
    """``parts[i]`` to rank i; what waits for those of all ranks for this one, and these in the order of the ranks."""
    own = parts[group.rank()]
    if own.numel() * own.element_size() > LARGE:
        keep_freed()
    coming = own.new_empty((group.size() - 1, *own.shape))
    rows = [*coming[: group.rank()], own, *coming[group.rank() :]]
    return _started(parts, rows, group), rows


def _started(sent: Sequence[Tensor], received: Sequence[Tensor], group: ProcessGroup) -> _Messages:
    """``sent[i]`` to every other rank i, ``received[i]`` from it, both contiguous; what waits until it is done."""
    while _abandoned:
        _abandoned.pop().give_up()
    ways, rank = group.size(), group.rank()
    number = FIRST_NUMBER + next(_numbers.setdefault(group, itertools.count())) % NUMBERS  # a cycle would keep them all
    works: list[Work] = []
    for step in range(1, ways):
        to, source = (rank + step) % ways, (rank - step) % ways
        if received[source].numel():
            works.append(group.recv([received[source]], source, number))
        if sent[to].numel():
            works.append(group.send([sent[to]], to, number))
    return _Messages(works, timeout_of(group), ref(group))


def _reduced(rows: Sequence[Tensor], op: str, out: Tensor) -> None:
    """The sum, or maximum, of ``rows`` in ``out``, one after the other.

    That of torch has, from five rows on, another order for the last few elements, as many as vectors of this processor
    do not fill, and for those where the part of a thread ends. Halves are added up in float32.
    """
    if op == "max":
        torch.maximum(rows[0], rows[1], out=out)
        for row in rows[2:]:
            torch.maximum(out, row, out=out)
    elif out.dtype in HALVES:
        total = rows[0].to(torch.float32)
        for row in rows[1:]:
            total.add_(row)
        out.copy_(total)
    else:
        torch.add(rows[0], rows[1], out=out)
        for row in rows[2:]:
            out.add_(row)


def _later(result: Tensor, complete: Callable[[Tensor], object], arrived: _Messages) -> Tensor:
    """``result``, which has its values once :func:`finish` has called ``complete`` with it.

    Where nobody waits for it any more (a step has failed), it is given back with its last user, before another tensor
    has its address. Messages may be under way then, which write to its memory: ``arrived`` holds that, and waits for
    them before the next ones start.
    """
    address = result.data_ptr()

    def abandon(_: object) -> None:
        if _pending.pop(address, None) is not None:
            _abandoned.append(arrived)

    _pending[address] = ref(result, abandon), complete
    return result
