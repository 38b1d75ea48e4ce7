"""The training loop of ``autopar train``: the parallel model and, beside it, the unmodified one on a single device."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.commands.byte_text import ByteText
from autopar.driver import parallelize
from autopar.lockstep import Transfer
from autopar.mesh import Mesh
from autopar.module import ParallelModule
from autopar.plan import Plan

CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """What a run is made of. ``log``: a file for one JSON line per step."""

    mesh: Mesh
    plan: Plan
    steps: int
    rate: float
    device: torch.device
    compare: bool
    log: Path | None = None


@dataclass
class Curve:
    """One model's losses and the seconds of its steps."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The usual step: the median without the first, which makes the program."""
        return statistics.median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True)
class Run:
    """What rank 0 knows in the end. ``traffic`` is that of ``counted`` steps."""

    parallel: Curve
    reference: Curve | None
    traffic: tuple[Transfer, ...]
    counted: int

    @property
    def difference(self) -> float | None:
        """The largest difference of the two losses at any step; not a number if one of them is not."""
        if self.reference is None:
            return None
        found = [abs(a - b) for a, b in zip(self.parallel.losses, self.reference.losses)]
        return math.nan if any(map(math.isnan, found)) else max(found)


def train(model: nn.Module, text: ByteText, settings: Settings, on_step: Callable[[int], None]) -> Run:
    """Train ``model`` over the mesh; on rank 0 a copy of it too, from the same weights on the same batches.

    ``on_step`` is called on every rank after every step. Raises what the compiler and the runtime raise.
    """
    reference = copy.deepcopy(model).to(settings.device) if settings.compare and is_first() else None
    parallel = parallelize(model.to(settings.device), settings.mesh, settings.plan)
    step = _Stepper(parallel, settings)
    beside = None if reference is None else _Stepper(reference, settings)
    warm: tuple[Transfer, ...] = ()
    with _log(settings) as log:
        for number in range(settings.steps):
            batch = {name: tensor.to(settings.device) for name, tensor in text(number).items()}
            if settings.mesh.world_size > 1:
                dist.barrier()  # rank 0 comes late, from the other model
            step(batch)
            if beside is not None:
                beside(batch)
            if number == 0:
                warm = parallel.traffic  # the first step also compares the programs of the ranks
            if log is not None:
                log.write(json.dumps(_record(number, step.curve, beside, text)) + "\n")
            on_step(number)
    alone = settings.steps == 1
    traffic = parallel.traffic if alone else _since(warm, parallel.traffic)
    return Run(step.curve, beside.curve if beside else None, traffic, 1 if alone else settings.steps - 1)


def is_first() -> bool:
    """Whether this is rank 0, or the only process; known before the process group is."""
    return int(os.environ.get("RANK", "0")) == 0


class _Stepper:
    """A model with its optimizer, as a script for one device would have them."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.device, self.curve = model.train(), settings.device, Curve()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)

    def __call__(self, batch: dict[str, Any]) -> None:
        start = time.perf_counter()
        loss = _loss(self.model(**batch))
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self.model, ParallelModule):
            self.model.clip_grad_norm_(CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.curve.losses.append(float(loss.detach()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.curve.seconds.append(time.perf_counter() - start)


def _loss(output: Any) -> torch.Tensor:
    found = output["loss"]
    assert isinstance(found, torch.Tensor)
    return found


def _log(settings: Settings) -> AbstractContextManager[Any]:
    if settings.log is None or not is_first():
        return nullcontext()
    try:
        return settings.log.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ValueError(f"--log {settings.log}: {error.strerror}") from error


def _record(number: int, curve: Curve, beside: _Stepper | None, text: ByteText) -> dict[str, Any]:
    record: dict[str, Any] = {"step": number, "loss": curve.losses[-1]}
    if beside is not None:
        record["reference_loss"] = beside.curve.losses[-1]
    return {**record, "tokens_per_second": round(text.batch * text.length / curve.seconds[-1], 1)}


def _since(before: tuple[Transfer, ...], now: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    """What was sent between two counts."""
    known = {(entry.phase, entry.axis, entry.name): entry for entry in before}
    found = []
    for entry in now:
        old = known.get((entry.phase, entry.axis, entry.name))
        operations, moved = (old.operations, old.bytes) if old else (0, 0)
        if entry.operations > operations:
            found.append(
                Transfer(entry.phase, entry.axis, entry.name, entry.operations - operations, entry.bytes - moved)
            )
    return tuple(found)
