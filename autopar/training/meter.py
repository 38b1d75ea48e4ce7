"""The measures of a step on this rank: time, time in collectives, bytes sent, memory, and the use of the device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from autopar.communication.stopwatch import Stopwatch
from autopar.cost.device_peaks import peak_flops
from autopar.cost.model_flops import learning_flops
from autopar.ir.program import AnyProgram
from autopar.ir.traffic import Transfer
from autopar.module import ParallelModule, held_by
from autopar.training.log import bytes_by_axis, peak_memory, since


@dataclass(frozen=True)
class Measures:
    """Of one step; the fields of the same names in :class:`autopar.training.step_record.StepRecord` say what."""

    seconds: float
    communication_share: float
    sent_bytes: dict[str, int]
    mfu: float | None
    peak_memory_bytes: int


class Meter:
    """Measures steps of ``model``, which is parallel or not.

    ``peak``: operations per second of one device, for one that :mod:`autopar.cost.device_peaks` does not know.
    """

    def __init__(self, model: nn.Module, device: torch.device, peak: float | None = None) -> None:
        self._model, self._device, self._peak = model, device, peak
        self._watch = _stopwatch(model)
        if self._watch is not None:
            self._watch.watched = True
        self._counted: tuple[AnyProgram, int] | None = None
        self.begin()

    def begin(self) -> None:
        """A step begins now."""
        self._sent, self._waited, self._runs = self._traffic(), self._seconds_waited(), self._runs_until_now()
        self._start = time.perf_counter()

    def end(self) -> Measures:
        """The step ends now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        waited = self._seconds_waited() - self._waited
        sent = bytes_by_axis(since(self._sent, self._traffic()))
        share = min(1.0, waited / seconds) if seconds else 0.0
        return Measures(seconds, share, sent, self._mfu(seconds), peak_memory(self._device))

    def _mfu(self, seconds: float) -> float | None:
        model = self._model
        if not isinstance(model, ParallelModule) or not seconds:
            return None
        peak = self._peak or peak_flops(self._device, _dtype(model))
        if peak is None:
            return None
        program, runs = model.program, self._runs_until_now() - self._runs
        if self._counted is None or self._counted[0] is not program:
            self._counted = program, learning_flops(program)
        return runs * self._counted[1] / (seconds * peak * model.mesh.world_size)

    def _runs_until_now(self) -> int:
        """Runs of a program that learn: one for each microbatch."""
        return held_by(self._model).calls if isinstance(self._model, ParallelModule) else 0

    def _traffic(self) -> tuple[Transfer, ...]:
        return self._model.traffic if isinstance(self._model, ParallelModule) else ()

    def _seconds_waited(self) -> float:
        return self._watch.seconds() if self._watch is not None else 0.0


def _stopwatch(model: nn.Module) -> Stopwatch | None:
    connection = held_by(model).weights.connection
    return None if connection is None else connection.comm.stopwatch


def _dtype(model: ParallelModule) -> torch.dtype:
    """The dtype in which products are computed."""
    lower = model.plan.precision.param
    if lower is not None:
        found = getattr(torch, lower)
        assert isinstance(found, torch.dtype)
        return found
    return next((parameter.dtype for parameter in model.parameters()), torch.get_default_dtype())
