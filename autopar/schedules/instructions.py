"""The instructions of pipeline ranks, as data: computes, sends and receives, in order, one list per rank.

    rank 0: F0.0  SEND F0.0 -> 1  RECV B1.0 -> 0  F0.1  SEND F0.1 -> 1  RECV B1.1 -> 0  B0.0  B0.1
    rank 1: RECV F0.0 -> 1  F1.0  RECV F0.1 -> 1  B1.0  SEND B1.0 -> 0  F1.1  B1.1  SEND B1.1 -> 0

A stage is a part of the model; each of ``p`` pipeline ranks holds ``v`` stages. ``F2.5`` is the forward of stage 2 on
microbatch 5. Sends and receives never block: a compute waits for its operands. All values that go from one stage to
another for one microbatch are one message, and the messages from one rank to another arrive in the order of the sends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # a schedule is made and drawn without torch, which takes seconds to import
    import torch

Values = tuple[tuple[tuple[int, ...], "torch.dtype"], ...]  # shape and dtype of each tensor of a message


class Kind(enum.StrEnum):
    """The kind of a compute of one stage and microbatch. Papers on zero-bubble schedules call ``I`` "B"."""

    F = "F"  # forward
    B = "B"  # whole backward
    I = "I"  # gradients of the inputs only  # noqa: E741
    W = "W"  # gradients of the weights only

    __hash__ = str.__hash__  # enum's own hash is written in Python and would take a third of the time of a check


BACKWARD = (Kind.B, Kind.I)  # the kinds that produce the gradients for the stages before
FREES = (Kind.B, Kind.W)  # the kinds after which a stage's activations are freed


@dataclass(frozen=True, slots=True)
class Compute:
    """Run ``kind`` of ``stage`` on ``microbatch``; prints ``F0.3``."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses from one stage to another for one microbatch: activations (F) or gradients (B; made by B or I)."""

    kind: Kind
    source: int
    target: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.source}.{self.microbatch} -> {self.target}"


@dataclass(frozen=True, slots=True)
class Send:
    """Send what ``kind`` (F or B) of ``stage`` made on ``microbatch`` to stage ``peer``; prints ``SEND F0.3 -> 1``."""

    kind: Kind
    stage: int
    microbatch: int
    peer: int

    @property
    def message(self) -> Message:
        return Message(self.kind, self.stage, self.peer, self.microbatch)

    def __str__(self) -> str:
        return f"SEND {self.message}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Post the receive of what ``kind`` (F or B) of stage ``peer`` made, for ``stage``; prints ``RECV F0.3 -> 1``."""

    kind: Kind
    stage: int
    microbatch: int
    peer: int

    @property
    def message(self) -> Message:
        return Message(self.kind, self.peer, self.stage, self.microbatch)

    def __str__(self) -> str:
        return f"RECV {self.message}"


Instruction = Compute | Send | Receive


@dataclass(frozen=True)
class Link:
    """Stage ``source`` makes values that stage ``target`` uses.

    ``values``: the shapes and dtypes, of one microbatch, that cross forward. ``grads``: those of the gradients that
    come back; none for integers.
    """

    source: int
    target: int
    values: Values
    grads: Values


@dataclass(frozen=True)
class Schedule:
    """One instruction list per pipeline rank. ``placement`` gives the rank of each stage."""

    name: str
    placement: tuple[int, ...]
    microbatches: int
    ranks: tuple[tuple[Instruction, ...], ...]

    @property
    def title(self) -> str:
        return f"schedule {self.name}"

    def computes(self, rank: int) -> Iterator[Compute]:
        return (step for step in self.ranks[rank] if isinstance(step, Compute))

    @property
    def has_messages(self) -> bool:
        return any(not isinstance(step, Compute) for steps in self.ranks for step in steps)


# Its dtype is a name: nothing is sent where schedules are drawn, and torch takes seconds to import.
ONE_NUMBER: Values = (((1,), cast("torch.dtype", "torch.float32")),)


def chain(stages: int, values: Values = ONE_NUMBER) -> tuple[Link, ...]:
    """The links of a plain pipeline: each stage passes ``values`` to the next and gets their gradients back.

    By default that is one float32 number.
    """
    return tuple(Link(stage, stage + 1, values, values) for stage in range(stages - 1))


class Flow:
    """The messages that a compute needs, and those that it makes, for given links."""

    def __init__(self, stages: int, links: Sequence[Link]) -> None:
        self.before: tuple[list[int], ...] = tuple([] for _ in range(stages))  # stages whose activations a stage uses
        self.after: tuple[list[int], ...] = tuple([] for _ in range(stages))
        self.returns: tuple[list[int], ...] = tuple([] for _ in range(stages))  # stages that send gradients to a stage
        self.returned: tuple[list[int], ...] = tuple([] for _ in range(stages))
        for link in links:
            self.before[link.target].append(link.source)
            self.after[link.source].append(link.target)
            if link.grads:
                self.returns[link.source].append(link.target)
                self.returned[link.target].append(link.source)

    def needs(self, step: Compute) -> list[Message]:
        """The messages that ``step`` uses, including those between stages of one rank."""
        if step.kind is Kind.F:
            return [Message(Kind.F, other, step.stage, step.microbatch) for other in self.before[step.stage]]
        if step.kind is Kind.W:
            return []
        return [Message(Kind.B, other, step.stage, step.microbatch) for other in self.returns[step.stage]]

    def makes(self, step: Compute) -> list[Message]:
        """The messages that ``step`` makes, including those between stages of one rank."""
        if step.kind is Kind.F:
            return [Message(Kind.F, step.stage, other, step.microbatch) for other in self.after[step.stage]]
        if step.kind is Kind.W:
            return []
        return [Message(Kind.B, step.stage, other, step.microbatch) for other in self.returned[step.stage]]
