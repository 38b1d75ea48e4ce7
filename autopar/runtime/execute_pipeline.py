"""A pipelined program at work on one rank: its stages by its instruction list, and one gradient for each parameter.

In a step :class:`PipelineExecutable` gives the microbatches to the rank's stages (:mod:`rank_stage`), lets the
:class:`Interpreter` run these in the order of the schedule, and then sums the loss, and gradients of parameters that
several stages use, over the pipeline ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from autopar.autodiff.autograd import WITNESS, applied, is_watched
from autopar.communication.agreement import agree
from autopar.communication.channels import Channels
from autopar.communication.communicator import Communicator
from autopar.communication.connect import Connection
from autopar.communication.recorder import epoch
from autopar.errors import InvariantError
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.signature import restore_output
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import PIPELINE
from autopar.pipeline import microbatches
from autopar.pipeline.interpreter import Event, Interpreter, Routes
from autopar.pipeline.links import backward_schedule, inference_schedule, links_of
from autopar.pipeline.microbatches import Weight
from autopar.pipeline.stages import users_of
from autopar.runtime.batch_counts import BatchCounts
from autopar.runtime.beside_loss import beside_loss
from autopar.runtime.giving import Give, put
from autopar.runtime.pipelined_backward import check_backward
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_stage import BoundStage, Microbatch, StageStep
from autopar.runtime.shared_with_users import Shared, shared_with
from autopar.runtime.written_between import WrittenBetween
from autopar.runtime.written_code import axes_of, code_of_stage
from autopar.schedules import timing
from autopar.schedules.instructions import Kind, Schedule
from autopar.schedules.packing import Types
from autopar.schedules.timing import Timeline
from autopar.weights.buffers_of_stages import BuffersOfStages
from autopar.weights.parameters import tables

StageCode = Callable[[bool, int], RankCode]


def open_groups(program: AnyProgram, communicator: Communicator) -> None:
    """Make the process groups that any rank needs for ``program``; collective.

    Also those that only other stages need: the names of later groups depend on how many a process has made.
    """
    communicator.open(axes_of(program))


class PipelineExecutable:
    """A pipelined program bound to the tensors of a module; ``connection`` is that of all ranks.

    ``code``: what gives that of a stage (of the rows of the first microbatch, its number), where it is there already,
    and so are the process groups.
    Raises InvariantError where the program and the module do not fit together.
    """

    def __init__(
        self, program: PipelinedProgram, root: nn.Module, connection: Connection, code: StageCode | None = None
    ) -> None:
        self.program, self.comm = program, connection.comm
        self.rank = self.comm.coordinates[PIPELINE]
        self.events: list[Event] = []  # of the latest step
        self.in_flight = 0  # microbatches, of each stage, that were held for a backward pass at a time in that step
        self._played = program.required_schedule
        inputs = [entry.target for _, entry in program.takes(InputKind.INPUT)]
        mine = program.stages_on(self.rank)
        programs = [program] if program.tail is None else [program, program.tail]
        if code is None:
            open_groups(program, self.comm)
        own = connection.of_stage()

        def bound(whole: PipelinedProgram, n: int) -> BoundStage:
            stage = whole.stages[n]
            loss = whole.loss_in(stage)
            found = code(whole is program, n) if code is not None else code_of_stage(stage, loss)
            return BoundStage(stage, found, root, own, inputs, loss, program)

        self.stages = {n: [bound(whole, n) for whole in programs] for n in mine}
        self._routes = Routes(program)
        self._types = [_types(whole) for whole in programs]
        self._loss = next((n for n, stage in mine.items() if program.loss_in(stage) is not None), None)
        self._ties = _ties(program, self.rank)
        slots = {name: (table, key) for _, table, key, name in tables(root)}
        held = {name: place for name, place in slots.items() if isinstance(place[0][place[1]], nn.Parameter)}
        self.kept = WrittenBetween(held, behind=self._behind)
        self._buffers = BuffersOfStages(program, self.comm, slots, self.rank)
        self._counts = [BatchCounts(whole, slots, own.comm) for whole in programs]
        self._takes_counts = any(any(stage.takes(InputKind.WHOLE)) for stage in mine.values())

    def _behind(self) -> list[str]:
        return [name for stages in self.stages.values() for stage in stages for name in stage.behind()]

    # ------------------------------------------------------------ running

    def train(self, batches: Sequence[Sequence[Tensor]], rows: Sequence[int], seed: int) -> Tensor:
        """Forward and backward of all microbatches; gradients are added to ``.grad``.

        Gives the loss of the whole batch, on every rank. Raises InvariantError for a model without a loss.
        """
        if not self.program.learns:
            frozen = "its loss has none\nWay out: requires_grad_(True) for what is to be trained, or model(**batch)."
            none = (
                "this one returns none\n"
                "Way out: pass labels, or compute the loss in a small nn.Module around the model."
            )
            raise InvariantError(
                "train_step needs a model that returns its loss, a scalar with a gradient; "
                + (none if self.program.loss is None else frozen)
            )
        run = self._steps(batches, rows, seed, True, None)
        with torch.no_grad():
            self._play_and_give(self.program.required_schedule, run)
            return self._total_loss(run)

    def run(self, batches: Sequence[Sequence[Tensor]], rows: Sequence[int], seed: int) -> Any:
        """The model's output for the whole batch.

        The loss is given on every rank; other outputs, whole, on the ranks of the stage that makes them, None on
        others. Where gradients are enabled, ``loss.backward()`` on every rank runs the backward passes of all
        microbatches: the order is that of GPipe, whatever the plan's schedule.
        """
        if torch.is_grad_enabled() and self.program.learns:
            given = torch.zeros((), device=self.comm.device, requires_grad=True)  # each rank has a backward pass by it
            step = _Forward(self, batches, rows, seed)
            step.trained = self._trained()
            loss: Tensor = applied(_Differentiable, step, WITNESS, given, *step.trained.values())
            return self._output(step.steps, loss, step)
        with torch.no_grad():
            run = self._steps(batches, rows, seed, False, self._users)
            self._play(self._forward_only, run)
            return self._output(run, self._total_loss(run) if self.program.loss is not None else None)

    def forward(self, step: _Forward) -> Tensor:
        """All forward passes, which keep the values that backward needs; gives the loss."""
        step.steps = self._steps(step.batches, step.rows, step.seed, True, self._users)
        self._play(self._forward_only, step.steps)
        step.versions = self.kept.after(step.saved)
        return self._total_loss(step.steps)

    def backward(self, step: _Forward, grad: Tensor) -> None:
        """All backward passes; gradients are added to ``.grad``."""
        for batch in _batches(step):
            batch.share = batch.share * grad
        self._play_and_give(self._backward_only, step.steps)

    def _trained(self) -> dict[str, Tensor]:
        """The parameters of this rank that get gradients: autograd is to know that the loss depends on them."""
        slots = {
            target: stage.slots[target] for stages in self.stages.values() for stage in stages for target in stage.gives
        }
        found = {target: table[key] for target, (table, key) in slots.items()}
        return {
            name: parameter for name, parameter in found.items() if not is_watched(parameter)
        }  # hooks are not for None

    @cached_property
    def _forward_only(self) -> Schedule:
        return inference_schedule(self.program)

    @cached_property
    def _backward_only(self) -> Schedule:
        return backward_schedule(self.program)

    @cached_property
    def _users(self) -> frozenset[str]:
        return frozenset(entry.target for entry in self.program.outputs if entry.kind is OutputKind.USER)

    def _output(self, steps: dict[int, StageStep], loss: Tensor | None, learns: _Forward | None = None) -> Any:
        found: dict[str, Tensor | None] = {}
        for position, (entry, types) in enumerate(zip(self.program.outputs, self.program.returned_types)):
            if entry.kind is not OutputKind.USER:
                continue
            makers = [step for step in steps.values() if entry.target in step.batches[0].outputs]
            parts = [batch.outputs[entry.target] for batch in makers[0].batches] if makers else []
            if position == self.program.loss:
                found[entry.target] = loss
                continue
            join = self.program.joins.get(entry.target)
            whole = microbatches.together(entry.target, parts, join) if parts else None
            if learns is not None and loss is not None and whole is not None and types[0].requires_grad:
                whole = beside_loss(loss, entry.target, whole.detach())
            found[entry.target] = whole
        if learns is not None:
            targets = [entry.target for _, entry in self.program.takes(InputKind.INPUT)]
            known = [(f"input '{name}'", each) for part in learns.batches for name, each in zip(targets, part)]
            known += [(f"output '{name}'", each) for name, each in found.items() if each is not None]
            learns.shared = shared_with(learns.saved, known)
        given = list(found.values())
        return restore_output(self.program, given) if self.program.out_spec is not None else tuple(given)

    def _steps(
        self,
        batches: Sequence[Sequence[Tensor]],
        rows: Sequence[int],
        seed: int,
        trains: bool,
        outputs: frozenset[str] | None,
    ) -> dict[int, StageStep]:
        channels = Channels(self.comm, [self._types[self._size(rows, number)] for number in range(len(rows))])
        steps, weights = {}, self._weights(batches, rows)
        for number, stages in self.stages.items():
            parts = [
                Microbatch(stages[self._size(rows, n)], tensors, seed + n, weight, weight.loss)
                for n, (tensors, weight) in enumerate(zip(batches, weights))
            ]
            steps[number] = StageStep(number, parts, channels, trains, outputs)
        return steps

    def _size(self, rows: Sequence[int], number: int) -> int:
        """The index of the program that microbatch ``number`` takes."""
        return int(rows[number] != rows[0])

    def _play(self, schedule: Schedule, steps: dict[int, StageStep]) -> None:
        channels = next(iter(steps.values())).channels
        self.in_flight = 0

        def count(rank: int) -> None:
            self.in_flight = max(self.in_flight, sum([step.in_flight for step in steps.values()]))

        interpreter = Interpreter(self._routes, schedule, self.rank, steps, channels, count)
        for _ in interpreter.run():
            raise AssertionError("a rank waits in its messages")
        channels.end()
        buffers = next(iter(steps.values())).batches[0].weight.buffers  # one for all of the step
        if buffers is not None:
            buffers.write()
        self._buffers.pass_on()
        self.events, self._played = interpreter.events, schedule
        if self.comm.recorder is not None:
            for event in self.events:
                self.comm.recorder.add("schedule", str(event.compute), event.start, event.end)

    def timeline(self) -> Timeline:
        """The latest step of all pipeline ranks, on each of them; collective.

        On a device, where computes are launched asynchronously, the times are those of the launches. Clocks of several
        machines agree as far as they are synchronised. Raises InvariantError where there was no step.
        """
        if not self.events:
            raise InvariantError("there is no timeline before the first step\nWay out: train_step(...) first.")
        computes = [list(self._played.computes(rank)) for rank in range(len(self._played.ranks))]
        times = torch.zeros(max(map(len, computes)), 2, dtype=torch.float64)
        own = torch.tensor([(event.start, event.end) for event in self.events], dtype=torch.float64)
        times[: len(own)] = own + epoch()
        everyone = self.comm.exchange(times.to(self.comm.device), PIPELINE).tolist()
        return Timeline.of_events(
            timing.Event(rank, step.kind, step.stage, step.microbatch, start, end)
            for rank, steps in enumerate(computes)
            for step, (start, end) in zip(steps, everyone[rank])
        )

    def _weights(self, batches: Sequence[Sequence[Tensor]], rows: Sequence[int]) -> list[Weight]:
        """What each microbatch counts for; only ranks whose stages take counts know these."""
        counted: list[list[Tensor]] = [[] for _ in batches]
        if self._takes_counts:
            shares = microbatches.shares(rows)
            counted = [self._counts[self._size(rows, n)].of(part, shares[n]) for n, part in enumerate(batches)]
        return microbatches.weights(self.program, counted, rows)

    def _total_loss(self, steps: dict[int, StageStep]) -> Tensor:
        assert self.program.loss is not None
        target = self.program.outputs[self.program.loss].target
        total = torch.zeros((), device=self.comm.device)
        if self._loss is not None:
            parts = [batch.outputs[target] * batch.share for batch in steps[self._loss].batches]
            total = torch.stack(parts).sum(0)
        else:
            total = total.to(_dtype_of_loss(self.program))
        return self.comm.all_reduce(total, PIPELINE)

    # ------------------------------------------------------------ gradients

    def _play_and_give(self, schedule: Schedule, steps: dict[int, StageStep]) -> None:
        try:
            self._play(schedule, steps)
            self._give()
        except BaseException:
            for stage in (stage for stages in self.stages.values() for stage in stages):
                stage.forget()
            raise

    def _give(self) -> None:
        """Reduce the gradients of all stages, sum those of parameters that several have, give them to the module."""
        self.comm.phase = "backward"
        self.comm.updates += 1
        found: dict[str, Tensor] = {}
        gives: dict[str, Give] = {}
        for stages in self.stages.values():
            for stage in stages:
                gives |= stage.gives
                for target, grad in stage.reduced().items():
                    found[target] = found[target].add_(grad) if target in found else grad
        for target, ranks in self._ties.items():
            stage = next(stages[0] for stages in self.stages.values() if target in stages[0].parameters)
            gives.setdefault(target, stage.giver(target))
            found[target] = self._over(ranks, found[target] if target in found else stage.no_gradient(target))
        slots = {target: slot for stages in self.stages.values() for target, slot in stages[0].slots.items()}
        for target, grad in found.items():
            table, key = slots[target]
            put(gives[target], table[key], grad)

    def _over(self, ranks: Iterable[int], grad: Tensor) -> Tensor:
        """The sum of the gradients of the pipeline ``ranks``, in the same order and so the same on each."""
        parts, works = {}, []
        grad = grad.contiguous()
        for rank in ranks:
            if rank != self.rank:
                parts[rank] = torch.empty_like(grad)
                works.append(self.comm.receive(parts[rank], rank))
                works.append(self.comm.send(grad, rank))
        for work in works:
            self.comm.finish(work, "summing the gradients of a parameter that several stages use")
        parts[self.rank] = grad
        first, *others = [parts[rank] for rank in sorted(parts)]
        return sum(others, first)


@dataclass
class _Forward:
    """A forward pass of all microbatches, and the values that its backward pass takes."""

    executable: PipelineExecutable
    batches: Sequence[Sequence[Tensor]]
    rows: Sequence[int]
    seed: int
    steps: dict[int, StageStep] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)
    is_done: bool = False

    @property
    def saved(self) -> list[Any]:
        return [value for batch in _batches(self) for value in batch.saved or ()]


def _batches(step: _Forward) -> list[Microbatch]:
    return [batch for stage in step.steps.values() for batch in stage.batches]


class _Differentiable(torch.autograd.Function):
    """The node of a pipeline in autograd's graph; it adds gradients of parameters itself."""

    @staticmethod
    def forward(ctx: Any, step: _Forward, witness: Tensor, given: Tensor, *parameters: Tensor) -> Tensor:
        ctx.step = step
        return step.executable.forward(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():
            raise InvariantError("create_graph=True asks for second derivatives, which a rank program does not have")
        agree(ctx.step.executable.comm.agreement, partial(check_backward, ctx))
        ctx.step.is_done, ctx.step.shared = True, []
        ctx.step.executable.backward(ctx.step, grad)
        return (None,) * len(ctx.needs_input_grad)


def _types(program: PipelinedProgram) -> dict[tuple[Kind, int, int], Types]:
    found: dict[tuple[Kind, int, int], Types] = {}
    for link in links_of(program):
        found[Kind.F, link.source, link.target] = link.values
        found[Kind.B, link.target, link.source] = link.grads
    return found


def _ties(program: PipelinedProgram, rank: int) -> dict[str, tuple[int, ...]]:
    """Trained parameter -> the pipeline ranks that have a copy, where there are several and ``rank`` is one."""
    placement = program.required_schedule.placement
    trained = {target for stage in program.stages for target in stage.required_role.grads}
    ranks = {name: tuple(sorted({placement[n] for n in stages})) for name, stages in users_of(program).items()}
    return {name: of for name, of in ranks.items() if name in trained and len(of) > 1 and rank in of}


def _dtype_of_loss(program: PipelinedProgram) -> torch.dtype:
    assert program.loss is not None
    (kind,) = program.returned_types[program.loss]
    return kind.dtype
