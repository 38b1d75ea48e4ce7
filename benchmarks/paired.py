"""Two ways of doing the same step, timed in turns: what else the machine is doing then falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.subjects import Batch

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Times:
    """Seconds of each step: of the clock, from when all ranks start to when all are done; of the processors, summed
    over the ranks; and of the clock for each phase on this rank."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    phases: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def phase_ms(self) -> dict[str, float]:
        return {name: 1e3 * statistics.median(column) for name, column in zip(PHASES, zip(*self.phases))}


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
    cpu, start = time.process_time(), time.perf_counter()
    loss = contender.forward(batch)
    forward = time.perf_counter()
    contender.backward(loss)
    backward = time.perf_counter()
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    done = time.perf_counter()
    _all_here()
    times.wall.append(time.perf_counter() - start)
    times.phases.append((forward - start, backward - forward, done - backward))
    times.cpu.append(_sum(time.process_time() - cpu))
    return loss.detach()


def _all_here() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sum(seconds: float) -> float:
    total = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)
