"""One pipeline stage on one rank, bound to the tensors of a module, and its work in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autopar.autodiff.autograd import below_autograd
from autopar.communication.channels import Channels
from autopar.communication.connect import Connection
from autopar.ir.node import Value
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.pipeline.interpreter import Values
from autopar.pipeline.microbatches import Weight
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import FORWARD, INFERENCE, INPUTS, REDUCE, WEIGHTS, WHOLE
from autopar.runtime.rank_program import BoundProgram, Step
from autopar.weights.border import joined


class BoundStage(BoundProgram):
    """The program of one stage, for microbatches of one size.

    ``inputs``: targets of the whole model's inputs. ``loss``: the position of its loss among the stage's outputs.
    ``whole``: the program of all stages.
    """

    def __init__(
        self,
        program: Program,
        code: RankCode,
        root: nn.Module,
        connection: Connection,
        inputs: Sequence[str],
        loss: int | None,
        whole: PipelinedProgram,
    ) -> None:
        super().__init__(program, code, root, connection, whole)
        self.loss = loss
        self._places = [inputs.index(target) for target in self.users]
        self.parameters = {entry.target: port for port, entry in program.takes(InputKind.PARAMETER)}
        self.at_once, self.later = code.gradients or ((), ())
        self.trains = code.gradients is not None
        self.gives = {target: self.giver(target) for target in self.later}
        self._types = program.returned_types
        self._partial: list[Tensor] | None = None  # gradients of all microbatches until now, not yet reduced

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of this stage, among all inputs of the model."""
        return [tensors[place] for place in self._places]

    def whole_output(self, position: int, local: Tensor) -> Tensor:
        return joined(local, self._result(position).layout, self.comm)

    def _result(self, position: int) -> Value:
        (kind,) = self._types[position]
        return kind

    def tangents(self, grads: Values, share: Tensor | float) -> list[Tensor]:
        """The gradients of the stage's results: of sent values, and of the loss, which has the weight ``share``."""
        found = []
        for position in self.role.differentiable:
            entry, kind = self.program.outputs[position], self._result(position)
            if entry.kind is OutputKind.SENT:
                found.append(grads.pop(entry.target))
            else:
                found.append(torch.as_tensor(share, dtype=kind.dtype, device=self.comm.device))
        return found

    def step(self, name: str, given: list[Any]) -> list[Tensor]:
        """The results of a step of backward in memory of their own, to which those of others are then added."""
        is_added_to = self._partial is None and name != INPUTS
        with below_autograd():
            return self.own(name, given) if is_added_to else list(self.results(name, given))

    def add(self, partial: list[Tensor]) -> None:
        if self._partial is None:
            self._partial = partial
        elif partial:
            torch._foreach_add_(self._partial, partial)

    def reduced(self) -> dict[str, Tensor]:
        """The gradients of this rank's parameters over all microbatches; the data axes communicate here."""
        if self._partial is None:
            return {}
        partial, self._partial = self._partial, None
        with below_autograd():
            return dict(zip(self.later, self.own(REDUCE, partial)))

    def no_gradient(self, target: str) -> Tensor:
        kind = self.parameters[target].value
        return torch.zeros(kind.layout.local_shape(self.comm.mesh), dtype=kind.dtype, device=self.comm.device)

    def forget(self) -> None:
        """Drop the state of a step that failed, so that nothing of it is added to the next."""
        self._partial = None


@dataclass
class Microbatch:
    """One microbatch on its way through a stage.

    ``tensors``: all inputs of the model; ``weight``: what it counts for in the batch; ``share``: of its loss.
    """

    stage: BoundStage
    tensors: Sequence[Tensor]
    seed: int
    weight: Weight
    share: Tensor | float
    saved: list[Any] | None = None
    kept: list[Any] | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


class StageStep:
    """The work of one stage in one step, for the interpreter.

    ``trains``: forward keeps the values that backward needs. ``outputs``: the outputs that are to be kept, whole; None:
    the loss alone.
    """

    def __init__(
        self,
        number: int,
        batches: Sequence[Microbatch],
        channels: Channels,
        trains: bool,
        outputs: frozenset[str] | None,
    ) -> None:
        self.number, self.batches, self.channels = number, batches, channels
        self.trains, self.wanted = trains, outputs
        self.in_flight = 0  # microbatches with values held for a backward pass

    def forward(self, number: int, received: Values) -> Values:
        batch = self.batches[number]
        stage = batch.stage
        step = Step(
            stage.inputs(batch.tensors), batch.seed, received, wholes=batch.weight.wholes, buffers=batch.weight.buffers
        )
        forward = stage.graphs.learning if self.wanted is None else FORWARD
        saved = stage.call(forward if self.trains else INFERENCE, step)
        if self.trains and stage.trains:
            batch.saved = list(saved)
            self.in_flight += 1
        sent = Values()
        for position, entry in enumerate(stage.program.outputs):
            wanted = position == stage.loss if self.wanted is None else entry.target in self.wanted
            if entry.kind is OutputKind.SENT:
                sent[entry.target] = step.returned[position]
            elif entry.kind is OutputKind.USER and wanted:
                batch.outputs[entry.target] = stage.whole_output(position, step.returned[position])
        return sent

    def backward(self, number: int, grads: Values) -> Values:
        batch = self.batches[number]
        if not batch.stage.trains:
            return {}
        found = self._backward(batch, number, WHOLE, grads)
        batch.stage.add(found[len(batch.stage.at_once) :])
        self.in_flight -= 1
        return dict(zip(batch.stage.at_once, found))

    def input_gradients(self, number: int, grads: Values) -> Values:
        batch = self.batches[number]
        if not batch.stage.trains:
            return {}
        found = self._backward(batch, number, INPUTS, grads)
        batch.kept = found[len(batch.stage.at_once) :]
        return dict(zip(batch.stage.at_once, found))

    def weight_gradients(self, number: int) -> None:
        batch = self.batches[number]
        if batch.kept is not None:
            kept, batch.kept = batch.kept, None
            batch.stage.add(batch.stage.step(WEIGHTS, kept))
            self.in_flight -= 1

    def _backward(self, batch: Microbatch, number: int, name: str, grads: Values) -> list[Tensor]:
        assert batch.saved is not None, "backward before forward"
        given, batch.saved = batch.saved, None
        self.channels.sent(self.number, number)  # backward may write into a value that was sent
        given += batch.stage.tangents(grads, batch.share)
        batch.stage.comm.phase = "backward"
        return batch.stage.step(name, given)
