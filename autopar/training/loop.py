"""The training loop of ``autopar train``: the parallel model and, beside it, the unmodified one on a single device."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from autopar.api import parallelize
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.weights import load_safetensors
from autopar.data.batch_source import Batch, Counts, Source
from autopar.data.parts import Share
from autopar.ir.load import ExpertLoad
from autopar.ir.traffic import Transfer
from autopar.mesh import Mesh
from autopar.module import ParallelModule
from autopar.plan import Plan
from autopar.pretrained.gathered import gather
from autopar.traces.slices import OF_RANKS
from autopar.training.calls import arguments, loss_after, moved, total
from autopar.training.evaluation import Evaluation
from autopar.training.log import Log, added, since
from autopar.training.meter import Measures, Meter
from autopar.training.profiling import profile
from autopar.training.ranks import is_first
from autopar.training.saving import Saver, Saving, Start
from autopar.training.sinks import Sink
from autopar.training.step_record import StepRecord
from autopar.training.stopping import StopSignal, most_of_ranks
from autopar.zoo.named import Files

TRACED = 2  # the third step: what the first two do once is over


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        steps: of the whole run, including those before a resumed checkpoint.
        compare: train the unmodified model too, unless the run resumes a checkpoint.
        accumulate: batches in a step, whose gradients are averaged.
        clip: the largest norm of all gradients that is left as it is; 0: no limit.
        log: a file for one JSON line per step.
        program: a directory with the program of a step, compiled before.
        trace: a directory, in which ``ranks`` gets the timelines of one step: the third of this run, or its last.
        profile: a directory for the files of :func:`autopar.training.profiling.profile`, of the same step.
        evaluation: data that the parallel model is evaluated on, and when.
        files: where the weights are that the model, which has none, starts from; each rank reads its slices.
        dtype: in which the unmodified model computes, where that is less than float32.
        peak: operations per second of one device, where :mod:`autopar.cost.device_peaks` does not know it.
    """

    mesh: Mesh
    plan: Plan
    steps: int
    rate: float
    device: torch.device
    compare: bool
    accumulate: int = 1
    clip: float = 1.0
    saving: Saving | None = None
    log: Path | None = None
    program: Path | None = None
    trace: Path | None = None
    peak: float | None = None
    profile: Path | None = None
    evaluation: Evaluation | None = None
    files: Files | None = None
    dtype: str | None = None


@dataclass
class Curve:
    """One model's losses, norms of gradients (before they are clipped) and the seconds of its steps."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float | None:
        """The usual time of a step: the median without the first, which compiles the program. None without a step."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Run:
    """The result of a run on rank 0. ``traffic`` is that of ``counted`` steps; ``stopped``: by SIGTERM, before its end.

    ``counts``: rows and tokens of all its steps. ``evaluations``: losses of evaluations by the steps done before them.
    ``saved``: the last checkpoint. ``loads``: of the experts of each layer, of all steps, where the plan counts them.
    """

    parallel: Curve
    reference: Curve | None
    traffic: tuple[Transfer, ...]
    counted: int
    counts: Counts
    start: Start = Start()
    stopped: bool = False
    saved: Path | None = None
    loads: Mapping[str, ExpertLoad] = field(default_factory=dict)
    evaluations: Mapping[int, float] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """The number of steps, including those before the start."""
        return self.start.step + len(self.parallel.losses)

    @property
    def difference(self) -> float | None:
        """The largest difference of the two losses at any step; NaN if one of them is."""
        if self.reference is None:
            return None
        found = [abs(a - b) for a, b in zip(self.parallel.losses, self.reference.losses)]
        return math.nan if any(map(math.isnan, found)) else max(found)


def train(
    model: nn.Module,
    batches: Source,
    settings: Settings,
    on_start: Callable[[Start], None],
    on_step: Sink,
) -> Run:
    """Train ``model`` over the mesh; on rank 0 a copy of it too, from the same weights on the same batches.

    ``on_start`` is called on every rank once it is known where the run starts, ``on_step`` after every step. SIGTERM to
    any rank ends the run after its step. Raises what the compiler, the runtime and checkpoints raise.
    """
    saving = settings.saving
    resumes = saving is not None and saving.latest is not None
    compares = settings.compare and not resumes
    if settings.files is None:
        reference = copy.deepcopy(model).to(settings.device) if compares and is_first() else None
        parallel = parallelize(model.to(settings.device), settings.mesh, settings.plan, program=settings.program)
    else:
        parallel = _with_weights(model, settings.files, batches, settings)
        reference = gather(parallel, device=settings.device) if compares else None
    step = _Stepper(parallel, settings)
    beside = None if reference is None else _Stepper(reference, settings)
    saver, start = None, Start()
    if saving is not None:
        if saving.resume:  # the layout of parameters must be known before their states are loaded
            args, kwargs = arguments(moved(batches.first(share_of(settings)), settings.device))
            parallel.prepare(*args, **kwargs)
        saver = Saver(saving, batches, parallel, step.optimizer)
        start = saver.start()
    on_start(start)
    append = saving is not None and saving.resume
    with Log(settings.log if is_first() else None, append) as log, StopSignal() as stop:
        if start.path is not None:
            log.write(event="resumed", step=start.step, checkpoint=str(start.path), mesh=dict(settings.mesh.axes))
        loop = _Loop(step, beside, batches, settings, log, stop)
        done = loop.run(start, saver, on_step)
        saved = saver.finish(done, loop.place, loop.finite) if saver else None
        if loop.stopped:
            log.write(event="stopped", step=done, checkpoint=str(saved) if saved else None)
    steps = done - start.step
    traffic = since(loop.evaluated, since(loop.warm, parallel.traffic) if steps > 1 else parallel.traffic)
    other = beside.curve if beside else None
    end = (start, loop.stopped, saved, loop.loads, loop.evaluations)
    return Run(step.curve, other, traffic, max(1, steps - 1), total(loop.counts), *end)


def _with_weights(model: nn.Module, files: Files, batches: Source, settings: Settings) -> ParallelModule:
    """``model``, which is on the meta device, over the mesh, with the weights of ``files``."""
    parallel = parallelize(model, settings.mesh, settings.plan, program=settings.program)
    args, kwargs = arguments(moved(batches.first(share_of(settings)), settings.device))
    parallel.prepare(*args, **kwargs)
    with Peers(parallel).agreed("loading weights"):
        load_safetensors(parallel, files.folder, strict=files.complete)
    return parallel


class _Loop:
    """Steps of the parallel model and of the unmodified one, if there is one, until all are done or SIGTERM came."""

    def __init__(
        self,
        step: _Stepper,
        beside: _Stepper | None,
        source: Source,
        settings: Settings,
        log: Log,
        stop: StopSignal,
    ) -> None:
        self._step, self._beside, self._source, self._settings = step, beside, source, settings
        self._log, self._stop = log, stop
        self._share = share_of(settings)
        self.place = 0  # batches that were read
        self.stopped = False
        self.finite = True  # the loss, and the norm of the gradients, of the latest step
        self.loads: dict[str, ExpertLoad] = {}
        self.warm: tuple[Transfer, ...] = ()  # of the first step, which also compares the programs of the ranks
        self.evaluated: tuple[Transfer, ...] = ()  # of evaluations; after the first step, of later ones
        self.evaluations: dict[int, float] = {}
        self.counts = [Counts(0, 0)]  # of each step

    def run(self, start: Start, saver: Saver | None, on_step: Sink) -> int:
        """The number of steps done."""
        self.place, done = start.batches, start.step
        while done < self._settings.steps and not self.stopped:
            with self._traced(done - start.step, self._settings.steps - done == 1):
                record = self._one(done)
            if done == start.step:
                self._end_of_first(done + 1)
            done += 1
            if saver is not None and not self.stopped:
                saver.after(done, self.place, self.finite)
            on_step(record)
        return done

    @contextmanager
    def _traced(self, number: int, is_last: bool) -> Iterator[None]:
        """Records the step ``number`` of this run, if it is the one to be traced: none that compiles."""
        model, settings = self._step.model, self._settings
        with ExitStack() as stack:
            if number == TRACED or (is_last and number < TRACED):
                assert isinstance(model, ParallelModule)
                if settings.trace is not None:
                    stack.enter_context(model.trace(settings.trace / OF_RANKS))
                if settings.profile is not None:
                    stack.enter_context(profile(model, settings.profile))
            yield

    def _one(self, number: int) -> StepRecord:
        settings = self._settings
        batches = _batches(self._source, self.place, settings, self._share)
        counts = list(map(self._source.counts, batches))
        measures = self._step(batches)
        if self._beside is not None:
            self._beside(batches if self._share is None else _batches(self._source, self.place, settings))
        self.place += len(batches)
        self._evaluate(number + 1)
        record = self._record(number, counts, measures)
        self._log.write(**record.to_json())
        return record

    def _end_of_first(self, done: int) -> None:
        if done < self._settings.steps:  # the only step of a run counts itself
            self.warm, self.evaluated = self._step.traffic, ()

    def _evaluate(self, done: int) -> None:
        evaluation = self._settings.evaluation
        if evaluation is None or not evaluation.is_due(done, self._settings.steps):
            return
        before = self._step.traffic
        self.evaluations[done] = evaluation.loss(self._step.model, self._share, self._settings.device)
        self.evaluated = added(self.evaluated, since(before, self._step.traffic))

    def _record(self, number: int, counts: list[Counts], measures: Measures) -> StepRecord:
        """What is known of the step, once all ranks have ended it; rank 0 is late, for it runs the other model too."""
        settings, curve = self._settings, self._step.curve
        rows, tokens = total(counts)
        self.counts.append(Counts(rows, tokens))
        broken = not (math.isfinite(curve.losses[-1]) and math.isfinite(curve.norms[-1]))
        noted = [float(self._stop.noted), float(broken), measures.peak_memory_bytes]
        stop, broken_somewhere, most = most_of_ranks(noted, settings.device, settings.plan.timeout)
        self.stopped, self.finite = bool(stop), not broken_somewhere
        loads = self._step.expert_load()
        self.loads = {layer: self.loads[layer] + load if layer in self.loads else load for layer, load in loads.items()}
        return StepRecord(
            step=number,
            loss=curve.losses[-1],
            grad_norm=curve.norms[-1],
            tokens_per_second=None if tokens is None else tokens / measures.seconds,
            rows_per_second=None if tokens is not None else rows / measures.seconds,
            peak_memory_bytes_most=int(most),
            reference_loss=self._beside.curve.losses[-1] if self._beside else None,
            evaluation_loss=self.evaluations.get(number + 1),
            expert_load=loads,
            **vars(measures),
        )


def share_of(settings: Settings) -> Share | None:
    """What this rank passes of each batch; None: the whole."""
    return Share.of(settings.mesh) if settings.plan.inputs == "local" else None


def _batches(source: Source, place: int, settings: Settings, share: Share | None = None) -> list[Batch]:
    numbers = range(place, place + settings.accumulate)
    found = [source(n) if share is None else source(n, share) for n in numbers]
    return [moved(batch, settings.device) for batch in found]


class _Stepper:
    """A model with its optimizer, as a script for one device would have them."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.curve = model.train(), Curve()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
        self._meter = Meter(model, settings.device, settings.peak)
        self._clip = settings.clip or math.inf
        self._in_parts = settings.plan.microbatches > 1 or settings.mesh.is_pipelined  # the one batch of a step

    @property
    def traffic(self) -> tuple[Transfer, ...]:
        return self.model.traffic if isinstance(self.model, ParallelModule) else ()

    def expert_load(self) -> dict[str, ExpertLoad]:
        """The load of the experts in the latest step, where the plan counts it."""
        if isinstance(self.model, ParallelModule) and self.model.plan.counts_load:
            return self.model.expert_load()
        return {}

    def __call__(self, batches: list[Batch]) -> Measures:
        self._meter.begin()
        losses = []
        for batch in batches:
            if self._in_parts and isinstance(self.model, ParallelModule):
                args, kwargs = arguments(batch)
                losses.append(self.model.train_step(*args, **kwargs))
                continue
            with nullcontext() if batch is batches[-1] else self._no_sync():
                loss = loss_after(self.model, batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.curve.losses.append(sum(map(float, losses)))
        self.curve.norms.append(float(norm))
        measures = self._meter.end()
        self.curve.seconds.append(measures.seconds)
        return measures

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, ParallelModule) else nullcontext()

    def _clip_gradients(self) -> Tensor:
        if isinstance(self.model, ParallelModule):
            return self.model.clip_grad_norm_(self._clip)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
