"""The steps of a user's own training loop, measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.training.meter import Meter
from autopar.training.ranks import is_first
from autopar.training.sinks import Sink
from autopar.training.step_record import StepRecord


@dataclass
class Said:
    """What a script says of its step: ``loss`` and ``grad_norm``, tensors or numbers."""

    loss: Any = None
    grad_norm: Any = None


class Watch:
    """Measures the steps of a training loop, and calls each of ``on_step`` with a ``StepRecord`` on rank 0.

    Every rank makes one and uses it alike; it sends nothing. ``start``: the number of the first step. ``peak_tflops``
    of one device, for ``mfu`` on a device that autopar does not know::

        watch = autopar.Watch(model, print)
        for batch in loader:
            with watch.step(tokens=batch["input_ids"].numel()) as step:
                step.loss = model(**batch).loss
                step.loss.backward()
                step.grad_norm = model.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        on_step: Sink | Iterable[Sink],
        *,
        start: int = 0,
        peak_tflops: float | None = None,
    ) -> None:
        self._sinks: tuple[Sink, ...] = tuple(on_step) if isinstance(on_step, Iterable) else (on_step,)
        tensors = next(model.parameters(), None)
        device = tensors.device if tensors is not None else torch.device("cpu")
        self._meter = Meter(model, device, peak_tflops * 1e12 if peak_tflops else None)
        self._next = start

    @contextmanager
    def step(self, tokens: int | None = None) -> Iterator[Said]:
        """One step, of ``tokens`` of all ranks together. A step that raises has no record."""
        said = Said()
        self._meter.begin()
        yield said
        measures = self._meter.end()
        number, self._next = self._next, self._next + 1
        if is_first():
            record = StepRecord(
                step=number,
                loss=_number(said.loss),
                grad_norm=_number(said.grad_norm),
                tokens_per_second=None if tokens is None else tokens / measures.seconds,
                **vars(measures),
            )
            for sink in self._sinks:
                sink(record)


def _number(said: Any) -> float | None:
    return None if said is None else float(said.detach() if isinstance(said, Tensor) else said)
