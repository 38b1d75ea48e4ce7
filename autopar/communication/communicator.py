"""The collectives of a rank program, on torch.distributed: the ``comm`` of an emitted ``forward(comm, inputs)``.

Every method stands for the operator of the same name in :mod:`autopar.ir.collectives`. A peer that dies or does not
come within the timeout ends the program with a RankFailedError that names the collective, the axis and the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.communication import functional_collectives as torch_collectives
from autopar.communication.agreement import Agreement, ranks_text
from autopar.communication.groups import new_group
from autopar.communication.pieces import apart, crossing, put, take, together
from autopar.communication.recorder import Recorder
from autopar.communication.stopwatch import Stopwatch
from autopar.errors import RankFailedError
from autopar.ir.layout import Split
from autopar.ir.load import add
from autopar.ir.traffic import Transfer, moved_bytes
from autopar.mesh import PIPELINE, Mesh

PLAIN = (1,)
_UNWATCHED = nullcontext()


class Communicator:
    """The collectives of one rank. ``groups`` has a process group for every axis of more than one rank.

    Those of merged axes, and of parts of one, are made by :meth:`open`, or at their first use.

    ``device`` is where the rank computes, ``back`` the group of messages to lower pipeline ranks, ``world`` the number
    in torch's world of each rank of the mesh. ``phase`` names the present phase, for :attr:`traffic`.

    ``agreement``: what the ranks have said that they do next; it is waited for before the first collective.
    """

    def __init__(
        self,
        mesh: Mesh,
        groups: Mapping[str, ProcessGroup],
        rank: int,
        timeout: float,
        device: torch.device,
        back: ProcessGroup | None = None,
        world: Sequence[int] = (),
        agreement: Agreement | None = None,
    ) -> None:
        self.mesh, self.rank, self.timeout, self.device = mesh, rank, timeout, device
        self.coordinates = mesh.coordinates(rank)
        self.phase = "forward"
        self._back = back
        self._world = world or range(mesh.world_size)
        self._groups = {axis: groups[axis] if size > 1 else None for axis, size in mesh.axes}
        self._stages = mesh.group(rank, PIPELINE) if PIPELINE in mesh.names else ()  # of the same position within each
        self._positions: dict[str, Tensor] = {}
        self._started: dict[int, str] = {}  # address of the result of one under way -> its name
        self._messages: dict[dist.Work, Tensor] = {}  # until finished: peers of a step that stopped use it
        self._sent: dict[tuple[str, str, str], list[int]] = {}  # (phase, axis, name) -> [operations, bytes]
        self.agreement = agreement or Agreement(None, self.failed)
        self.updates = 0  # backward passes that have given gradients: the parameters may have changed since
        self.recorder: Recorder | None = None  # of the steps that are traced now
        self.is_profiled = False  # graphs run with the labels of modules
        self.stopwatch = Stopwatch(device)  # of what this rank waits
        self.noted: dict[str, Tensor] = {}  # layer of experts -> rows that this rank has sent to each of them

    def open(self, axes: Iterable[str]) -> None:
        """Make the groups of ``axes`` that there are not yet; collective over each of them, in the same order."""
        for axis in axes:
            self.group(axis)

    def position(self, axis: str) -> int:
        """This rank's position on ``axis``."""
        return self.mesh.position(axis, self.coordinates)

    def group(self, axis: str) -> ProcessGroup | None:
        """The process group of ``axis``; None for one rank. Where it must be made first, this is collective."""
        if axis not in self._groups:
            self._groups[axis] = self._new_group(axis) if self.mesh.size(axis) > 1 else None
        return self._groups[axis]

    def _new_group(self, axis: str) -> ProcessGroup:
        members = self.mesh.group(self.rank, axis)
        try:
            return new_group([self._world[rank] for rank in members], self.timeout)
        except RuntimeError as problem:
            peers = [rank for rank in members if rank != self.rank]
            what = f"making the process group of axis '{axis}'"
            raise peer_failed(what, self.rank, peers, self.timeout, problem) from None

    # ------------------------------------------------------------ without communication

    def axis_index(self, axis: str) -> Tensor:
        """This rank's position on ``axis``, an int64 scalar."""
        if axis not in self._positions:
            self._positions[axis] = torch.tensor(self.position(axis), device=self.device)
        return self._positions[axis]

    def enter(self, x: Tensor, axis: str) -> Tensor:
        return x

    def release(self, x: Tensor, axis: str) -> Tensor:
        return x

    def tally(self, x: Tensor, axis: str, counts: Tensor, layer: str, group: str, places: Sequence[int]) -> Tensor:
        """Add ``counts`` to :attr:`noted`."""
        if self.phase == "forward":
            self.noted[layer] = add(self.noted, layer, counts)
        return x

    def keep_first(self, x: Tensor, axis: str) -> Tensor:
        return x.contiguous() if self.position(axis) == 0 else x.new_zeros(x.shape)

    def split(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        return take(x, Split.of(dim, outer, ratio), self.position(axis), ways)

    split_replicated = split

    def pad(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        return put(x, Split.of(dim, outer, ratio), self.position(axis), ways, length)

    # ------------------------------------------------------------ with communication

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum", in_place: bool = False) -> Tensor:
        """``in_place``: the result may take the memory of ``x``, which nobody reads any more."""
        if self.group(axis) is None:
            return x
        return self._send("all_reduce", axis, x, torch_collectives.all_reduce, op, in_place)

    def all_gather(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        return self._gather("all_gather", x, axis, Split.of(dim, outer, ratio), length)

    def all_gather_invariant(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        return self._gather("all_gather_invariant", x, axis, Split.of(dim, outer, ratio), length)

    def reduce_scatter(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        if self.group(axis) is None:
            return x
        parts = apart(x, Split.of(dim, outer, ratio), ways)
        own = self._send("reduce_scatter", axis, parts.flatten(0, 1), torch_collectives.reduce_scatter)
        return own.view(parts.shape[1:])

    def all_to_all(self, x: Tensor, axis: str, ways: int, source: Sequence[int], target: Sequence[int]) -> Tensor:
        """From split by ``source`` to split by ``target``, each (dim, outer, *ratio)."""
        if self.group(axis) is None:
            return x
        before, after = (Split.of(end[0], end[1], end[2:]) for end in (source, target))
        parts = apart(x, after, ways)
        received = self._send("all_to_all", axis, parts.flatten(0, 1), torch_collectives.all_to_all)
        return together(received.view(parts.shape), before, parts.shape[1 + before.dim] * ways)

    def reorder(self, x: Tensor, axis: str, ways: int, source: Sequence[int], target: Sequence[int]) -> Tensor:
        """From split by ``source`` to split by ``target``, both of one dim; no rank has more than its part."""
        if self.group(axis) is None or list(source) == list(target):
            return x
        before, after = (Split.of(end[0], end[1], end[2:]) for end in (source, target))
        dim, length = before.dim, x.shape[before.dim] * ways
        way, back = (crossing(*ends, length, self.position(axis), ways) for ends in ((before, after), (after, before)))
        blocks = [x.narrow(dim, block * way.size, way.size) for block in way.order]
        exchange = (torch_collectives.exchange, way.counts, back.counts)
        got = self._send("reorder", axis, torch.stack(blocks), *exchange)  # the copy is gone before the next
        return torch.cat([got[back.order.index(block)] for block in range(len(back.order))], dim)

    def shift(self, x: Tensor, axis: str, ways: int, by: int) -> Tensor:
        """``x`` to the rank ``by`` further on the axis, in exchange for the tensor of the rank ``by`` before."""
        return self.wait(self.start_shift(x, axis, ways, by), axis)

    def start_shift(self, x: Tensor, axis: str, ways: int, by: int) -> Tensor:
        """As :meth:`shift`; see :meth:`start_all_reduce`."""
        if self.group(axis) is None or by % ways == 0:
            return x.clone(memory_format=torch.contiguous_format)
        return self._start("shift", axis, x, torch_collectives.start_shift, by)

    def dispatch_rows(self, x: Tensor, axis: str, ways: int, send: Tensor, receive: Tensor) -> Tensor:
        """Rows of ``x``: the first ``send[0]`` to rank 0 of the axis, and so on; ``receive[i]`` come from rank i."""
        return self.wait(self.start_dispatch_rows(x, axis, ways, send, receive), axis)

    def return_rows(self, x: Tensor, axis: str, ways: int, send: Tensor, receive: Tensor) -> Tensor:
        """As :meth:`dispatch_rows`, for rows that go back."""
        return self.wait(self.start_return_rows(x, axis, ways, send, receive), axis)

    def start_dispatch_rows(self, x: Tensor, axis: str, ways: int, send: Tensor, receive: Tensor) -> Tensor:
        """As :meth:`dispatch_rows`; see :meth:`start_all_reduce`."""
        return self._start_rows("dispatch_rows", x, axis, send.tolist(), receive.tolist())

    def start_return_rows(self, x: Tensor, axis: str, ways: int, send: Tensor, receive: Tensor) -> Tensor:
        """As :meth:`return_rows`; see :meth:`start_all_reduce`."""
        return self._start_rows("return_rows", x, axis, send.tolist(), receive.tolist())

    def start_all_reduce(self, x: Tensor, axis: str, op: str = "sum", in_place: bool = False) -> Tensor:
        """As :meth:`all_reduce`, but the result is available only after :meth:`wait`; ``x`` must not change before."""
        if self.group(axis) is None:
            return x
        return self._start("all_reduce", axis, x, torch_collectives.start_all_reduce, op, in_place)

    def start_all_gather(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        """As :meth:`all_gather` of dim 0 in equal parts; see :meth:`start_all_reduce`."""
        if self.group(axis) is None:
            return x
        return self._start("all_gather", axis, x, torch_collectives.start_all_gather)

    def start_all_gather_into(self, whole: Tensor, x: Tensor, axis: str) -> Tensor:
        """As :meth:`start_all_gather`, into ``whole``, of which ``x`` may be this rank's part. ``axis`` has ranks."""
        return self._start("all_gather", axis, x, torch_collectives.start_all_gather_into, whole)

    def start_reduce_scatter(
        self, x: Tensor, axis: str, ways: int, dim: int, outer: int = 1, ratio: Sequence[int] = PLAIN, length: int = 0
    ) -> Tensor:
        """As :meth:`reduce_scatter` of dim 0 in equal parts; see :meth:`start_all_reduce`."""
        if self.group(axis) is None:
            return x
        return self._start("reduce_scatter", axis, x, torch_collectives.start_reduce_scatter)

    def wait(self, x: Tensor, axis: str) -> Tensor:
        if self.group(axis) is None:
            return x
        name, key = self._started.pop(x.data_ptr(), "a collective"), x.data_ptr()
        with _UNWATCHED if self.recorder is None else self.recorder.waiting(key):
            return self._guarded(name, axis, x, torch_collectives.wait)

    def _start(self, name: str, axis: str, x: Tensor, collective: Callable[..., Tensor], *more: Any) -> Tensor:
        return self._under_way(name, self._send(name, axis, x.contiguous(), collective, *more))

    def _under_way(self, name: str, result: Tensor) -> Tensor:
        self._started[result.data_ptr()] = name
        if self.recorder is not None:
            self.recorder.is_under_way(result.data_ptr())
        return result

    def _start_rows(self, name: str, x: Tensor, axis: str, send: list[int], receive: list[int]) -> Tensor:
        if self.group(axis) is None:
            return x
        leaving = (len(x) - send[self.position(axis)]) * x[:1].numel() * x.element_size()
        exchange = (torch_collectives.start_exchange, send, receive)
        return self._under_way(name, self._counted(name, axis, leaving, x.contiguous(), *exchange))

    def _gather(self, name: str, x: Tensor, axis: str, split: Split, length: int) -> Tensor:
        if self.group(axis) is None:
            return x
        gathered = self._send(name, axis, x.contiguous(), torch_collectives.all_gather)
        return together(gathered.view(self.mesh.size(axis), *x.shape), split, length)

    def _send(self, name: str, axis: str, x: Tensor, collective: Callable[..., Tensor], *more: Any) -> Tensor:
        size = moved_bytes(name, self.mesh.size(axis), x.numel() * x.element_size())
        return self._counted(name, axis, size, x, collective, *more)

    def _counted(
        self, name: str, axis: str, size: int, x: Tensor, collective: Callable[..., Tensor], *more: Any
    ) -> Tensor:
        group = self.group(axis)
        assert group is not None, axis
        if self.agreement.is_open:
            self.agreement.settle()
        counts = self._sent.setdefault((self.phase, axis, name), [0, 0])
        counts[0] += 1
        counts[1] += size
        with _UNWATCHED if self.recorder is None else self.recorder.issuing(f"communication {axis}", name, size):
            return self._guarded(name, axis, x, collective, group, *more)

    def _guarded(self, name: str, axis: str, x: Tensor, collective: Callable[..., Tensor], *more: Any) -> Tensor:
        begun = self.stopwatch.begin()
        try:
            result = collective(x, *more)
        except RuntimeError as problem:
            peers = [rank for rank in self.mesh.group(self.rank, axis) if rank != self.rank]
            raise peer_failed(f"{name} over axis '{axis}'", self.rank, peers, self.timeout, problem) from None
        self.stopwatch.end(begun)
        return result

    # ------------------------------------------------------------ messages between pipeline ranks

    def send(self, x: Tensor, position: int) -> dist.Work:
        """Start sending ``x``, which must not change until it has left, to a position on axis ``pp``."""
        counts = self._sent.setdefault((self.phase, PIPELINE, "send"), [0, 0])
        counts[0] += 1
        counts[1] += x.numel() * x.element_size()
        return self._message("send to", x, position, position > self.coordinates[PIPELINE])

    def receive(self, x: Tensor, position: int) -> dist.Work:
        """Start receiving into ``x`` the tensor that a position on axis ``pp`` sends."""
        return self._message("receive from", x, position, position < self.coordinates[PIPELINE])

    def _message(self, way: str, x: Tensor, position: int, upwards: bool) -> dist.Work:
        start = dist.isend if way == "send to" else dist.irecv
        peer, stream = self._stages[position], f"{way} {PIPELINE}={position}"
        group = self.group(PIPELINE) if upwards or self._back is None else self._back
        size = x.numel() * x.element_size() * (way == "send to")
        try:
            with _UNWATCHED if self.recorder is None else self.recorder.issuing(stream, way.partition(" ")[0], size):
                work = start(x, peer, group=group)
        except RuntimeError as problem:
            raise peer_failed("a message between pipeline ranks", self.rank, [peer], self.timeout, problem) from None
        assert work is not None
        self._messages[work] = x
        if self.recorder is not None:
            self.recorder.is_under_way(("message", id(work)))
        return work

    def finish(self, work: dist.Work, what: str) -> None:
        """Wait for a message."""
        begun = self.stopwatch.begin()
        try:
            with _UNWATCHED if self.recorder is None else self.recorder.waiting(("message", id(work)), what):
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as problem:
            peers = [rank for rank in self._stages if rank != self.rank]
            raise peer_failed(what, self.rank, peers, self.timeout, problem) from None
        self.stopwatch.end(begun)
        del self._messages[work]

    def exchange(self, x: Tensor, axis: str) -> Tensor:
        """The ``x`` of every rank of ``axis``: (ways, ...). Used between programs; not counted as traffic."""
        group = self.group(axis)
        if group is None:
            return x.unsqueeze(0)
        self.agreement.settle()
        return self._guarded("exchange", axis, x.unsqueeze(0), torch_collectives.all_gather, group)

    def from_first(self, x: Tensor) -> None:
        """Write what rank 0 of the mesh has in ``x``, which is contiguous, to all others. Not counted as traffic."""
        for axis in self.mesh.names:  # the ranks that have it now are those with position 0 on all axes to come
            group = self.group(axis)
            if group is not None:
                self._guarded("broadcast", axis, x, torch_collectives.broadcast, group)

    def failed(self, what: str, problem: Exception) -> RankFailedError:
        """The error for a wait in ``what`` for any other rank of the mesh."""
        peers = [rank for rank in range(self.mesh.world_size) if rank != self.rank]
        return peer_failed(what, self.rank, peers, self.timeout, problem)

    # ------------------------------------------------------------ traffic

    @property
    def traffic(self) -> tuple[Transfer, ...]:
        """Operations and bytes that this rank sent, by phase, axis and collective."""
        return tuple(Transfer(*key, *counts) for key, counts in self._sent.items())


def peer_failed(what: str, rank: int, peers: Sequence[int], timeout: float, problem: Exception) -> RankFailedError:
    """The error for a wait in ``what`` that ended in ``problem``."""
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].split(". ")[0]
    those = ranks_text(peers)
    return RankFailedError(
        f"rank {rank} waited in {what} for {those}: a peer ended, or did not answer within {timeout:g} s.\n"
        f"  torch says: {reason[:200]}\n"
        "Way out: the rank that failed first says why in its own output; then start again from the last checkpoint.\n"
        "One that ended well did not make this call: `if rank == 0` goes around print, not around calls of the model.\n"
        "If the peers were only slow, give them longer: Plan(timeout=seconds)."
    )
