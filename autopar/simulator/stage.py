"""One pipeline stage on all ranks that hold it, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from autopar.autodiff.halves import BackwardSteps, backward_steps
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.tables import SUM, InputKind, Output, OutputKind, join_key
from autopar.pipeline.interpreter import Values
from autopar.simulator.lockstep import Lockstep, Ranks
from autopar.simulator.parts import gathered_once, joined, rank_inputs

FIXED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)


@dataclass
class Microbatch:
    """``program``: the stage for this microbatch; ``inputs``: the user's tensors, by target.

    ``share``: the weight of its loss in that of the batch.
    """

    program: Program
    inputs: Mapping[str, Ranks]
    share: float
    saved: list[Ranks] | None = None
    kept: list[Ranks] | None = None  # from I to W
    outputs: dict[str, Tensor] = field(default_factory=dict)


class SimulatedStage:
    """``tensors``: whole parameters and buffers by name. ``joins``: those of the whole program."""

    def __init__(
        self,
        microbatches: Sequence[Microbatch],
        lockstep: Lockstep,
        tensors: Mapping[str, Tensor],
        backward: bool,
        joins: Mapping[str, str],
    ) -> None:
        self.microbatches, self.lockstep, self.trains = microbatches, lockstep, backward
        self.program, self._joins = microbatches[0].program, joins
        self.grads: dict[int, list[Ranks]] = {}  # of parameters, before the data axes reduce them: two sizes, two sums
        self.buffers: dict[str, Tensor] = {}
        self._graphs: dict[int, tuple[fx.Graph, list[Ranks]]] = {}
        self._steps: dict[int, BackwardSteps | None] = {}
        entries = [entry for _, entry in self.program.placeholders(*FIXED)]
        fixed = rank_inputs(self.program, tensors, kinds=FIXED)
        self._held = {entry.target: ranks for entry, ranks in zip(entries, fixed)}
        self.lockstep.hold(self._held.values())
        self._constants = {id(batch.program): self._constants_of(batch.program) for batch in microbatches}

    # ------------------------------------------------------------ work

    def forward(self, number: int, received: Values) -> Values:
        batch = self.microbatches[number]
        graph, whole = self._graph(batch.program)
        found = {**self._held, **self._constants[id(batch.program)], **batch.inputs, **received}
        inputs = [found[entry.target] for entry in batch.program.inputs]
        returned = self.lockstep.run(graph, [*inputs, *whole])
        count = len(batch.program.outputs)
        batch.saved = returned[count:] if self.trains else None
        return self._keep(batch, returned[:count])

    def backward(self, number: int, grads: Values) -> Values:
        batch, steps = self.microbatches[number], self._steps_of(number)
        if steps is None:
            return {}
        found = self.lockstep.run(steps.whole, self._given(batch, grads), "backward")
        self._add(batch.program, found[len(steps.at_once) :])
        return self._handed_on(dict(zip(steps.at_once, found)))

    def input_gradients(self, number: int, grads: Values) -> Values:
        batch, steps = self.microbatches[number], self._steps_of(number)
        if steps is None:
            return {}
        found = self.lockstep.run(steps.inputs, self._given(batch, grads), "backward")
        batch.kept = found[len(steps.at_once) :]
        return self._handed_on(dict(zip(steps.at_once, found)))

    def weight_gradients(self, number: int) -> None:
        batch, steps = self.microbatches[number], self._steps_of(number)
        if steps is not None:
            assert batch.kept is not None
            kept, batch.kept = batch.kept, None
            self.lockstep.drop(kept)  # from now on the graph holds them
            self._add(batch.program, self.lockstep.run(steps.weights, kept, "backward"))

    def reduced(self) -> Iterator[dict[str, Ranks]]:
        """The gradients of parameters, once all microbatches are done: those of each size of microbatch."""
        for number, batch in enumerate(self.microbatches):
            grads, steps = self.grads.pop(id(batch.program), None), self._steps_of(number)
            if grads is not None and steps is not None:
                self.lockstep.drop(grads)
                yield dict(zip(steps.later, self.lockstep.run(steps.reduce, grads, "backward")))

    @property
    def in_flight(self) -> int:
        return sum(batch.saved is not None or batch.kept is not None for batch in self.microbatches)

    # ------------------------------------------------------------ pieces

    def _constants_of(self, program: Program) -> Mapping[str, Ranks]:
        """The constants of the program of smaller microbatches, whatever others have under their names."""
        if program is self.program:
            return {}
        entries = [entry for _, entry in program.placeholders(InputKind.CONSTANT)]
        found = rank_inputs(program, {}, kinds=(InputKind.CONSTANT,))
        self.lockstep.hold(found)
        return {entry.target: ranks for entry, ranks in zip(entries, found)}

    def _graph(self, program: Program) -> tuple[fx.Graph, list[Ranks]]:
        """The forward graph, and the whole parameters that it takes after its inputs (``Plan(zero=1)``)."""
        if id(program) not in self._graphs:
            role = program.required_role
            held = [self._held.get(entry.target, []) for entry in program.inputs]
            graph = role.forward if self.trains else role.inference
            graph, given = gathered_once(program, graph, self.lockstep, held)
            whole = given[len(held) :]
            self.lockstep.hold(whole)
            self._graphs[id(program)] = graph, whole
        return self._graphs[id(program)]

    def _steps_of(self, number: int) -> BackwardSteps | None:
        program = self.microbatches[number].program
        if id(program) not in self._steps:
            self._steps[id(program)] = backward_steps(program)
        return self._steps[id(program)]

    def _given(self, batch: Microbatch, grads: Values) -> list[Ranks]:
        """The operands of the backward graph, which holds them from then on."""
        assert batch.saved is not None, "backward before forward"
        saved, batch.saved = batch.saved, None
        self.lockstep.drop(saved)
        for position in batch.program.required_role.differentiable:
            entry, node = batch.program.outputs[position], batch.program.returned[position]
            if entry.kind is OutputKind.SENT:
                saved.append(grads[entry.target])
            else:
                share = self.lockstep.weight(torch.tensor(batch.share, dtype=torch.float64)).to(value(node).dtype)
                saved.append([share] * self.lockstep.mesh.world_size)
        return saved

    def _add(self, program: Program, grads: list[Ranks]) -> None:
        before = self.grads.get(id(program))
        if before is not None:
            totals = [[total + part for total, part in zip(*pair)] for pair in zip(before, grads)]
            self.lockstep.drop([*before, *grads])
            self.lockstep.hold(totals)  # counted as added in place, as a rank does it
            grads = totals
        self.grads[id(program)] = grads

    def _keep(self, batch: Microbatch, returned: list[Ranks]) -> Values:
        sent = Values()
        for entry, node, ranks in zip(batch.program.outputs, batch.program.returned, returned):
            if entry.kind is OutputKind.SENT:
                sent[entry.target] = ranks
                continue
            self.lockstep.drop([ranks])
            layout = value(node).layout
            if entry.kind is OutputKind.USER:
                batch.outputs[entry.target] = joined(f"output {entry.target}", ranks, layout, self.lockstep.mesh)
            else:
                self._write(entry, ranks, joined(entry.target, ranks, layout, self.lockstep.mesh))
        return self._handed_on(sent)

    def _write(self, entry: Output, ranks: Ranks, whole: Tensor) -> None:
        """The new value of a buffer: found by the next microbatch, or kept until the end of the step."""
        join = self._joins.get(join_key(entry))
        if join is None:
            self._held[entry.target] = ranks
        if join == SUM and entry.target in self.buffers:
            whole = self.buffers[entry.target] + whole
        self.buffers[entry.target] = whole

    def _handed_on(self, values: Values) -> Values:
        """Values as messages: contiguous, as the stage that takes them expects; it holds them from then on."""
        self.lockstep.drop(values.values())
        return {name: [part.contiguous() for part in ranks] for name, ranks in values.items()}
