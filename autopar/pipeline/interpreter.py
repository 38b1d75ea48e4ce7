"""The interpreter of the instruction list of one pipeline rank: computes of its stages, sends and receives.

In a step the :class:`Interpreter` goes through the list: it asks ``Work`` for each compute, hands what that sends to
``Mail``, and takes from there what the next one receives. Sends and receives never block. The same interpreter runs a
rank of a real job and, one beside the other, all ranks of a simulation: it takes the meaning of a compute (``Work``)
and the transport of messages (``Mail``) as arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from autopar.ir.program import PipelinedProgram
from autopar.pipeline.links import links_of
from autopar.pipeline.stages import crossings
from autopar.schedules.instructions import Compute, Flow, Kind, Message, Schedule, Send

Values = dict[str, Any]  # "3.add_1": the value add_1 from or for stage 3


class Work(Protocol):
    """One stage on one rank."""

    def forward(self, microbatch: int, received: Values) -> Values:
        """The values that the stage sends."""

    def backward(self, microbatch: int, grads: Values) -> Values:
        """The gradients of received values, from those of sent values; gradients of parameters are added up."""

    def input_gradients(self, microbatch: int, grads: Values) -> Values:
        """As ``backward``, without gradients of parameters."""

    def weight_gradients(self, microbatch: int) -> None:
        """Add up the gradients of parameters that ``input_gradients`` left out."""


class Mail(Protocol):
    """Messages between pipeline ranks; those from one rank to another arrive in the order in which they are sent."""

    def send(self, message: Message, values: list[Any], rank: int) -> None: ...

    def post(self, message: Message, rank: int) -> None:
        """Get ready to receive ``message`` from ``rank``; called in the order of the sends."""

    def arrived(self, message: Message) -> bool: ...

    def take(self, message: Message) -> list[Any]:
        """Wait for a message that was posted."""


@dataclass(frozen=True)
class Event:
    """A compute and its time: seconds of this process's clock (``time.perf_counter``)."""

    compute: Compute
    start: float
    end: float


class Routes:
    """The values that go between the stages of a program, the same in every step."""

    def __init__(self, program: PipelinedProgram) -> None:
        self.flow = Flow(len(program.stages), links_of(program))
        self._names: dict[tuple[Kind, int, int], tuple[str, ...]] = {}
        for crossing in crossings(program):
            self._names[Kind.F, crossing.source, crossing.target] = crossing.names
            self._names[Kind.B, crossing.target, crossing.source] = crossing.grads

    def names(self, message: Message) -> tuple[str, ...]:
        """The values of a message, by the names in the stage that makes them in forward."""
        return self._names[message.kind, message.source, message.target]


class Interpreter:
    """One pipeline rank. ``works`` has its stages; ``after`` is called with its number after each compute."""

    def __init__(
        self,
        routes: Routes,
        schedule: Schedule,
        rank: int,
        works: Mapping[int, Work],
        mail: Mail,
        after: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.schedule, self.rank, self.works, self.mail, self.after = schedule, rank, works, mail, after
        self.routes, self.flow = routes, routes.flow
        self.events: list[Event] = []
        self._ready: dict[Message, list[Any]] = {}  # made by this rank: for another of its stages, or yet to be sent

    def run(self) -> Iterator[None]:
        """Run all instructions; yields where it would have to wait for another rank."""
        for step in self.schedule.ranks[self.rank]:
            if isinstance(step, Compute):
                needs = self.flow.needs(step)
                while not all(message in self._ready or self.mail.arrived(message) for message in needs):
                    yield
                values = {message: self._take(message) for message in needs}
                start = time.perf_counter()
                self._compute(step, values)
                self.events.append(Event(step, start, time.perf_counter()))
                self.after(self.rank)
            elif isinstance(step, Send):
                message = step.message
                self.mail.send(message, self._ready.pop(message), self.schedule.placement[message.target])
            else:
                self.mail.post(step.message, self.schedule.placement[step.message.source])

    def _take(self, message: Message) -> list[Any]:
        return self._ready.pop(message) if message in self._ready else self.mail.take(message)

    def _compute(self, step: Compute, values: dict[Message, list[Any]]) -> None:
        work, given = self.works[step.stage], Values()
        for message, tensors in values.items():
            given |= {f"{message.source}.{name}": tensor for name, tensor in zip(self.routes.names(message), tensors)}
        values.clear()
        if step.kind is Kind.W:
            work.weight_gradients(step.microbatch)
            return
        run = {Kind.F: work.forward, Kind.B: work.backward, Kind.I: work.input_gradients}[step.kind]
        made = run(step.microbatch, given)
        for message in self.flow.makes(step):
            self._ready[message] = [made.pop(f"{message.target}.{name}") for name in self.routes.names(message)]
