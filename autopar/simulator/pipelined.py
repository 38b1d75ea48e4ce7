"""A pipelined program run in this one process: every pipeline rank by its own instructions, with real messages."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InvariantError
from autopar.ir.node import value
from autopar.ir.program import PipelinedProgram
from autopar.ir.signature import restore_output
from autopar.ir.stacked_parameters import by_member
from autopar.ir.tables import InputKind, OutputKind
from autopar.ir.traffic import Transfer
from autopar.mesh import PIPELINE, Mesh
from autopar.pipeline import microbatches
from autopar.pipeline.interpreter import Interpreter, Routes
from autopar.pipeline.links import inference_schedule
from autopar.pipeline.microbatches import Untold, told
from autopar.schedules.instructions import Message, Schedule
from autopar.schedules.packing import together
from autopar.simulator.lockstep import Lockstep, Ranks
from autopar.simulator.parts import Step, counts_of, joined, rank_inputs
from autopar.simulator.stage import Microbatch, SimulatedStage


def simulate_pipeline(
    program: PipelinedProgram,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    backward: bool = True,
    seed: int = 0,
    make: Callable[[Mesh], Lockstep] = Lockstep,
) -> Step:
    """One step of a pipelined program; ``kwargs`` is the whole batch, which is cut into microbatches.

    See :func:`autopar.simulate.simulate`. ``traffic`` has for each kind the most that a rank sends. Raises
    InvariantError also where the pipeline ranks wait for each other.
    """
    with torch.no_grad():
        run = _Run(program, program.required_schedule if backward else inference_schedule(program), make)
        run.load(tensors, args, kwargs, backward, seed)
        run.play()
        return run.step(backward)


class _Run:
    """One step on all ranks."""

    def __init__(self, program: PipelinedProgram, schedule: Schedule, make: Callable[[Mesh], Lockstep]) -> None:
        self.program, self.schedule, self.mesh = program, schedule, program.mesh.of_stage
        self.lockstep = [make(self.mesh) for _ in schedule.ranks]
        self.stages: list[SimulatedStage] = []
        self.in_flight = [0] * len(schedule.ranks)

    def load(
        self,
        tensors: Mapping[str, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        backward: bool,
        seed: int,
    ) -> None:
        plan = self.program.plan
        batches = microbatches.parts(args, kwargs, self.program.mesh, plan)
        rows = microbatches.rows(kwargs, batches, plan)
        programs = [self.program.of_rows(count == rows[0]) for count in rows]
        flat = [replace(program.whole, mesh=self.mesh) for program in programs]
        given = []
        for number, (program, batch) in enumerate(zip(flat, batches)):
            kinds = (InputKind.INPUT, InputKind.SEED)
            found = rank_inputs(program, tensors, (), batch, seed + number, kinds)
            given.append(dict(zip([entry.target for _, entry in program.placeholders(*kinds)], found)))
        cut = zip(programs, batches, microbatches.shares(rows))
        counted = [counts_of(program, tensors, (), batch, share) for program, batch, share in cut]
        weights = microbatches.weights(self.program, counted, rows)
        self.shares = [weight.loss for weight in weights]
        for inputs, weight in zip(given, weights):
            wholes = {name: self.lockstep[0].weight(whole) for name, whole in weight.wholes.items()}
            inputs |= {name: [whole] * self.mesh.world_size for name, whole in wholes.items()}
        for number, rank in enumerate(self.schedule.placement):
            stages = [program.stages[number] for program in programs]
            parts = [Microbatch(*of) for of in zip(stages, given, self.shares)]
            self.stages.append(SimulatedStage(parts, self.lockstep[rank], tensors, backward, self.program.joins))

    def play(self) -> None:
        """Run all ranks in turn, each as far as it can advance."""
        post, routes = _Post(self.lockstep), Routes(self.program)
        players: dict[int, Iterator[None]] = {}
        for rank in range(len(self.schedule.ranks)):
            works = {n: self.stages[n] for n, place in enumerate(self.schedule.placement) if place == rank}
            players[rank] = Interpreter(routes, self.schedule, rank, works, _Box(post, rank), self._count).run()
        while players:
            before = post.sent, len(players)
            players = {rank: player for rank, player in players.items() if next(player, self) is None}
            if players and (post.sent, len(players)) == before:
                raise InvariantError(f"schedule {self.schedule.name}: ranks {sorted(players)} wait for each other")

    def _count(self, rank: int) -> None:
        held = sum(stage.in_flight for n, stage in enumerate(self.stages) if self.schedule.placement[n] == rank)
        self.in_flight[rank] = max(self.in_flight[rank], held)

    def step(self, backward: bool) -> Step:
        outputs, loss = self._outputs()
        output = restore_output(self.program, outputs) if self.program.out_spec is not None else tuple(outputs)
        grads = self._grads() if backward else {}
        buffers = {name: whole for stage in self.stages for name, whole in stage.buffers.items()}
        most: Counter[tuple[str, str, str, str]] = Counter()
        for transfer in (transfer for lockstep in self.lockstep for transfer in lockstep.traffic):
            for what, amount in (("operations", transfer.operations), ("bytes", transfer.bytes)):
                key = (transfer.phase, transfer.axis, transfer.name, what)
                most[key] = max(most[key], amount)
        kinds = dict.fromkeys(key[:3] for key in most)
        traffic = tuple(Transfer(*kind, most[*kind, "operations"], most[*kind, "bytes"]) for kind in kinds)
        peaks = tuple(memory.peak for lockstep in self.lockstep for memory in lockstep.memory)
        loads = {layer: load for lockstep in self.lockstep for layer, load in lockstep.loads.items()}
        return Step(output, loss, grads, buffers, traffic, peaks, tuple(self.in_flight), loads, tuple(self.shares))

    def _outputs(self) -> tuple[list[Tensor | Untold], Tensor | None]:
        """The model's output for the whole batch, and its loss."""
        found: list[Tensor | Untold] = []
        loss: Tensor | None = None
        for position, entry in enumerate(self.program.outputs):
            if entry.kind is not OutputKind.USER:
                continue
            makers = (stage for stage in self.stages if entry in stage.program.outputs)
            parts = [batch.outputs[entry.target] for batch in next(makers).microbatches]
            if position == self.program.loss:
                loss = torch.stack([part * share for part, share in zip(parts, self.shares)]).sum(0)
                found.append(loss)
                continue
            found.append(told(entry.target, parts, self.program.joins.get(entry.target)))
        return found, loss

    def _grads(self) -> dict[str, Tensor]:
        """Whole gradients; for a parameter that several stages have, the sum."""
        total: dict[str, Tensor] = {}
        for stage in self.stages:
            layouts = {entry.target: value(node).layout for node, entry in stage.program.placeholders(*InputKind)}
            for name, ranks in (entry for found in stage.reduced() for entry in found.items()):
                whole = joined(f"gradient of {name}", ranks, layouts[name], self.mesh)
                total[name] = total[name] + whole if name in total else whole
        return by_member(total)


class _Post:
    """Messages between the pipeline ranks: a channel for each pair and direction, first in, first out."""

    def __init__(self, lockstep: Sequence[Lockstep]) -> None:
        self.lockstep, self.sent = lockstep, 0
        self.under_way: dict[tuple[int, int], deque[tuple[Message, list[Ranks]]]] = defaultdict(deque)
        self.posted: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self.here: dict[Message, list[Ranks]] = {}

    def match(self, channel: tuple[int, int]) -> None:
        while self.under_way[channel] and self.posted[channel]:
            message, values = self.under_way[channel].popleft()
            wanted = self.posted[channel].popleft()
            if message != wanted:
                raise InvariantError(f"rank {channel[1]} is ready for {wanted}, rank {channel[0]} has sent {message}")
            self.here[message] = values


class _Box:
    """The post as one rank sees it."""

    def __init__(self, post: _Post, rank: int) -> None:
        self.post_office, self.rank = post, rank

    def send(self, message: Message, values: list[Any], rank: int) -> None:
        self.post_office.sent += 1
        phase = "forward" if message.kind == "F" else "backward"
        pieces = len(together([(tuple(ranks[0].shape), ranks[0].dtype) for ranks in values]))
        sizes = [ranks[0].numel() * ranks[0].element_size() for ranks in values]
        self.post_office.lockstep[self.rank].count(phase, PIPELINE, "send", pieces, sum(sizes))
        self.post_office.under_way[self.rank, rank].append((message, values))
        self.post_office.match((self.rank, rank))

    def post(self, message: Message, rank: int) -> None:
        self.post_office.posted[rank, self.rank].append(message)
        self.post_office.match((rank, self.rank))

    def arrived(self, message: Message) -> bool:
        return message in self.post_office.here

    def take(self, message: Message) -> list[Any]:
        return self.post_office.here.pop(message)
