"""Two ways of doing the same step, timed in turns: what else the machine is doing then falls on both. Or one of them
alone, for its memory."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.process_memory import allocated, forget_most_resident, most_resident, of_tensors, resident
from benchmarks.subjects import Batch

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Times:
    """Seconds of each step: of the clock, from when all ranks start to when all are done, and of the processors, summed
    over the ranks; and of each phase on this rank alone."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall_phases: list[Sequence[float]] = field(default_factory=list)
    cpu_phases: list[Sequence[float]] = field(default_factory=list)

    def phase_ms(self) -> dict[str, dict[str, float]]:
        """Medians by clock and phase."""
        clocks = {"wall": self.wall_phases, "cpu": self.cpu_phases}
        return {
            clock: {name: 1e3 * statistics.median(column) for name, column in zip(PHASES, zip(*rows))}
            for clock, rows in clocks.items()
        }


@dataclass(frozen=True)
class Ratio:
    """Of pairs measured one after the other: the median, and the middle half of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs)], n=4)
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """Milliseconds a step of ours and of the peer; ratios ours / peer of the clock and of the processors of all ranks;
    milliseconds of the phases on rank 0, by clock (``wall``, ``cpu``); the largest difference of the losses."""

    ours_ms: float
    peer_ms: float
    wall: Ratio
    cpu: Ratio
    ours_phases: dict[str, dict[str, float]]
    peer_phases: dict[str, dict[str, float]]
    loss_difference: float

    @classmethod
    def of(cls, ours: Times, peer: Times, loss_difference: float) -> Comparison:
        return cls(
            ours_ms=1e3 * statistics.median(ours.wall),
            peer_ms=1e3 * statistics.median(peer.wall),
            wall=Ratio.of(ours.wall, peer.wall),
            cpu=Ratio.of(ours.cpu, peer.cpu),
            ours_phases=ours.phase_ms(),
            peer_phases=peer.phase_ms(),
            loss_difference=loss_difference,
        )


def compare(ours: Contender, peer: Contender, batches: Callable[[int], Batch], steps: int, warm_up: int) -> Comparison:
    """Both measured in turns, see :func:`measure`."""
    (mine, theirs), difference = measure((ours, peer), batches, steps, warm_up)
    return Comparison.of(mine, theirs, difference)


def held_and_peak(
    make: Callable[[], Contender], batches: Callable[[int], Batch], steps: int, warm_up: int
) -> tuple[int, int]:
    """Bytes allocated between steps, and at the peak of a step, of the rank that has most. The only contender of the
    process, which was started with ``process_memory.EXACT``."""
    gc.collect()
    before, tensors_before = allocated(), of_tensors()
    contender = make()
    measure((contender,), batches, warm_up, 0)
    gc.collect()
    between = max(allocated() - before, of_tensors() - tensors_before)  # the former misses what was freed meanwhile
    forget_most_resident()
    start = resident()
    measure((contender,), batches, steps, 0)
    added = most_resident() - start
    found = torch.tensor([between, between + added])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found[0]), int(found[1])


def phases_text(phases: dict[str, dict[str, float]]) -> str:
    """``68/186/40``: milliseconds of processor time that forward, backward and optimizer take."""
    return "/".join(f"{ms:.0f}" for ms in phases["cpu"].values())


def measure(
    contenders: Sequence[Contender], batches: Callable[[int], Batch], steps: int, warm_up: int
) -> tuple[list[Times], float]:
    """Times of each contender over ``steps`` steps, and the largest difference of their losses at any step.

    ``batches(n)`` is the whole batch of step n. Who goes first changes with every step.
    """
    times = [Times() for _ in contenders]
    difference = 0.0
    for number in range(warm_up + steps):
        losses: dict[int, Tensor] = {}
        order = range(len(contenders))
        for index in order if number % 2 else reversed(order):
            part = contenders[index].part(batches(number))
            losses[index] = _step(contenders[index], part, times[index] if number >= warm_up else Times())
        found = [contender.whole_loss(losses[index]) for index, contender in enumerate(contenders)]
        difference = max(difference, max(found) - min(found))
    return times, difference


def _step(contender: Contender, batch: Batch, times: Times) -> Tensor:
    _all_here()
    marks = [_now()]
    loss = contender.forward(batch)
    marks.append(_now())
    contender.backward(loss)
    marks.append(_now())
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    marks.append(_now())
    _all_here()
    marks.append(_now())
    wall, cpu = zip(*marks)
    times.wall.append(wall[-1] - wall[0])
    times.wall_phases.append([after - before for before, after in itertools.pairwise(wall[:-1])])
    times.cpu_phases.append([after - before for before, after in itertools.pairwise(cpu[:-1])])
    times.cpu.append(_sum(cpu[-1] - cpu[0]))
    return loss.detach()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _all_here() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sum(seconds: float) -> float:
    total = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)
