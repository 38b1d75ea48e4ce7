"""The bytes of one pipeline rank in a step: its stages by its own instructions, as the simulator runs them.

The last microbatches may have fewer rows than the first, and then have programs of their own (``tail``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.autodiff.halves import backward_steps
from autopar.ir.node import Node, value
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import SHARE, Input, InputKind, OutputKind
from autopar.memory.account import ACTIVATIONS, GRADIENTS, INPUTS, WORKING, Account
from autopar.memory.shapes import Form, Held
from autopar.memory.step import fresh, gathered_once, placed
from autopar.memory.tape import Tapes
from autopar.pipeline.interpreter import Interpreter, Routes, Values
from autopar.pipeline.links import links_of
from autopar.schedules.instructions import Kind, Message

FIXED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)
OF_BATCH = (InputKind.INPUT, InputKind.SEED, InputKind.WHOLE)


def pipelined_step(program: PipelinedProgram, place: int, tapes: Tapes, account: Account, small: int = 1) -> None:
    """Play what the pipeline rank ``place`` does in a step of a finished program.

    ``small``: how many microbatches are those of its tail, if it has one.
    """
    schedule, tail = program.required_schedule, program.tail
    large = schedule.microbatches - (small if tail is not None else 0)
    of_each = [program.of_rows(number < large) for number in range(schedule.microbatches)]
    tensors = Tensors(account)
    stages = {
        number: Stage([one.stages[number] for one in of_each], number, tensors, tapes)
        for number in program.stages_on(place)
    }
    types = {id(one): _types(one) for one in (program, *([tail] if tail is not None else []))}
    mail = _Arrivals([types[id(one)] for one in of_each], account)
    player = Interpreter(Routes(program), schedule, place, stages, mail, lambda _: account.mark())
    for _ in player.run():
        raise AssertionError("every message has arrived")
    for stage in stages.values():
        stage.reduce()
    account.mark()


class Tensors:
    """What the stages of a rank share: tensors of the model that are whole, and the user's, of each microbatch."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._known: dict[object, Held] = {}

    def of_model(self, program: Program, *kinds: InputKind) -> dict[str, Held]:
        """Parameters, buffers and constants, by target."""
        found = {}
        for node, entry in program.placeholders(*kinds):
            known = program.constants.get(entry.target) if entry.kind is InputKind.CONSTANT else None
            key = entry.target if known is None else known.untyped_storage().data_ptr()
            own = bool(value(node).layout.axes)
            found[entry.target] = self._once((entry.kind, object() if own else key), program, node, entry)
        return found

    def of_batch(self, program: Program, number: int) -> dict[str, Held]:
        """The inputs of a microbatch, by target; sums over the whole batch are those of all."""
        found = {}
        for node, entry in program.placeholders(*OF_BATCH):
            is_sum = entry.kind is InputKind.WHOLE and entry.target != SHARE
            found[entry.target] = self._once((None if is_sum else number, entry.target), program, node, entry)
        return found

    def _once(self, key: object, program: Program, node: Node, entry: Input) -> Held:
        if key not in self._known:
            self._known[key] = placed(self.account, program, node, entry)
        return self._known[key]


Types = Mapping[tuple[Kind, int, int], Sequence[tuple[Sequence[int], torch.dtype]]]


def _types(program: PipelinedProgram) -> Types:
    """The content of the messages of a microbatch."""
    found: dict[tuple[Kind, int, int], Sequence[tuple[Sequence[int], torch.dtype]]] = {}
    for link in links_of(program):
        found[Kind.F, link.source, link.target] = link.values
        found[Kind.B, link.target, link.source] = link.grads
    return found


@dataclass(frozen=True)
class _Arrivals:
    """Messages, which have all arrived; they are memory of this rank from their use on."""

    types: Sequence[Types]
    account: Account

    def send(self, message: Message, values: list[Held], rank: int) -> None:
        """What has left is not held."""

    def post(self, message: Message, rank: int) -> None:
        """Nothing is held before it is taken."""

    def arrived(self, message: Message) -> bool:
        return True

    def take(self, message: Message) -> list[Held]:
        kind = ACTIVATIONS if message.kind is Kind.F else WORKING
        types = self.types[message.microbatch][message.kind, message.source, message.target]
        return [fresh(self.account, Form.contiguous(shape, dtype), kind) for shape, dtype in types]


@dataclass
class Kept:
    """What a microbatch leaves for its backward pass: after F, and between I and W."""

    saved: list[Held]
    partial: list[Held]


class Stage:
    """One stage of a rank, as :class:`autopar.simulator.stage.SimulatedStage`. ``programs``: of each microbatch."""

    def __init__(self, programs: Sequence[Program], number: int, tensors: Tensors, tapes: Tapes) -> None:
        self.programs, self.number, self.tensors, self.tapes = programs, number, tensors, tapes
        self.account = tensors.account
        self.kept: dict[int, Kept] = {}
        self.grads: dict[int, list[Held]] = {}  # of parameters, before the data axes reduce them: two sizes, two sums
        self.held = tensors.of_model(programs[0], *FIXED)
        self._hold(list(self.held.values()))
        self._graphs: dict[int, tuple[fx.Graph, list[Held]]] = {}
        self._steps = {key: backward_steps(program) for key, program in {id(p): p for p in programs}.items()}
        self._constants: dict[int, dict[str, Held]] = {id(programs[0]): {}}
        for program in programs:
            if id(program) not in self._constants:
                self._constants[id(program)] = tensors.of_model(program, InputKind.CONSTANT)
                self._hold(list(self._constants[id(program)].values()))

    # ------------------------------------------------------------ work

    def forward(self, microbatch: int, received: Values) -> Values:
        program = self.programs[microbatch]
        graph, whole = self._gathered(program)
        self._now("forward", microbatch)
        own = {**self._constants[id(program)], **self.tensors.of_batch(program, microbatch)}
        found = {**self.held, **own, **received}
        inputs = [found[entry.target] for entry in program.inputs]
        returned = self.tapes.run(graph, self.account, [*inputs, *whole], ACTIVATIONS)
        count = len(program.outputs)
        self.kept[microbatch] = Kept(returned[count:], [])
        return self._given_away(program, returned[:count])

    def backward(self, microbatch: int, grads: Values) -> Values:
        return self._backward(microbatch, grads, "backward")

    def input_gradients(self, microbatch: int, grads: Values) -> Values:
        return self._backward(microbatch, grads, "backward of inputs")

    def weight_gradients(self, microbatch: int) -> None:
        program = self.programs[microbatch]
        steps = self._steps[id(program)]
        if steps is not None:
            self._now("backward of weights", microbatch)
            partial = self.kept.pop(microbatch).partial
            self._release(partial)  # from now on the graph holds them
            self._add(program, self.tapes.run(steps.weights, self.account, partial, WORKING, 0))

    def reduce(self) -> None:
        """The reductions of gradients, once all microbatches are done: those of each size of microbatch."""
        self.account.phase = f"reduce, stage {self.number}"
        for program in self.programs:
            grads, steps = self.grads.pop(id(program), None), self._steps[id(program)]
            if grads is not None and steps is not None:
                self._release(grads)
                self.tapes.run(steps.reduce, self.account, grads, GRADIENTS, 0)

    # ------------------------------------------------------------ pieces

    def _backward(self, microbatch: int, grads: Values, phase: str) -> Values:
        program = self.programs[microbatch]
        steps = self._steps[id(program)]
        if steps is None:
            return {}
        self._now(phase, microbatch)
        whole, count = phase == "backward", len(steps.at_once)
        graph, given = steps.whole if whole else steps.inputs, self._saved(program, microbatch, grads)
        found = self.tapes.run(graph, self.account, given, WORKING, count if whole else None)
        if whole:
            self._add(program, found[count:])
            del self.kept[microbatch]
        else:
            self.kept[microbatch] = Kept([], found[count:])
        return self._sent(dict(zip(steps.at_once, found)))

    def _now(self, phase: str, microbatch: int) -> None:
        self.account.phase = f"{phase}, stage {self.number}, microbatch {microbatch}"

    def _gathered(self, program: Program) -> tuple[fx.Graph, list[Held]]:
        """The forward graph, and the whole parameters that it takes after its inputs (``Plan(zero=1)``)."""
        if id(program) not in self._graphs:
            role = program.required_role
            graph = role.inference if role.backward is None else role.forward
            nothing = Held(Form.contiguous((0,), torch.float32), self.account.new((INPUTS, 0)))
            held = [self.held.get(entry.target, nothing) for entry in program.inputs]
            graph, given = gathered_once(program, graph, self.tapes, self.account, held.copy())
            self._hold(given[len(held) :])
            self._graphs[id(program)] = graph, given[len(held) :]
        return self._graphs[id(program)]

    def _saved(self, program: Program, microbatch: int, grads: Values) -> list[Held]:
        """The operands of the backward graph, which holds them from then on."""
        saved = self.kept[microbatch].saved
        self._release(saved)
        for position in program.required_role.differentiable:
            entry, node = program.outputs[position], program.returned[position]
            if entry.kind is OutputKind.SENT:
                saved.append(grads[entry.target])
            else:
                saved.append(fresh(self.account, Form.contiguous((), value(node).dtype), INPUTS))
        return saved

    def _add(self, program: Program, grads: list[Held]) -> None:
        before = self.grads.get(id(program))
        if before is not None:
            totals = [fresh(self.account, one.form, GRADIENTS) for one in before]
            self._release([*before, *grads])
            self._hold(totals)  # added in place
            grads = totals
        self.grads[id(program)] = grads

    def _given_away(self, program: Program, returned: Sequence[Held]) -> Values:
        sent = Values()
        for entry, one in zip(program.outputs, returned):
            if entry.kind is OutputKind.SENT:
                sent[entry.target] = one
                continue
            self._release([one])
            if entry.kind is not OutputKind.USER:
                self.held[entry.target] = one
        return self._sent(sent)

    def _sent(self, values: Mapping[str, Held]) -> Values:
        """Values as messages: contiguous, as the stage that takes them expects; it holds them from then on."""
        self._release(list(values.values()))
        return {
            name: one if one.form.is_contiguous else fresh(self.account, one.form, self.account.kind(one.storage))
            for name, one in values.items()
        }

    def _hold(self, values: Sequence[Held]) -> None:
        self.account.hold(one.storage for one in values)

    def _release(self, values: Sequence[Held]) -> None:
        self.account.release(one.storage for one in values)
