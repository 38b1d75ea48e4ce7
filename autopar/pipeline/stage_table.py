"""The figures of each pipeline stage of an assignment (memory, computing, messages), as data and as a table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.ir.node import origin
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.ir.traffic import count_text, size_text
from autopar.pipeline.interval_costs import StageGraph
from autopar.pipeline.stages import Assignment

COLUMNS = ("stage", "from", "to", "parameters", "FLOPs", "time", "states", "activations", "memory", "sends")


@dataclass(frozen=True)
class Stage:
    """One stage on one rank.

    Attributes:
        first, last: the modules of its first and of its last call ("" for calls of the model itself).
        parameters: elements of its parameters, as its rank holds them between steps.
        flops: operations of one forward microbatch.
        seconds: of one microbatch, forward and backward, by the roofline model (:mod:`autopar.cost.roofline`).
        flops_share, time_share: of those of all stages.
        state_bytes: parameters, gradients and AdamW states.
        activation_bytes: bytes that one microbatch keeps for its backward pass (an estimate).
        memory_bytes: states, and activations of all microbatches in flight.
        sent_bytes: of one microbatch, forward, to all later stages together.
        received_bytes: of one microbatch, forward, from all earlier stages together.
    """

    stage: int
    first: str
    last: str
    parameters: int
    flops: int
    seconds: float
    flops_share: float
    time_share: float
    state_bytes: int
    activation_bytes: int
    memory_bytes: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class StageTable:
    """``stages`` in order; ``balance``: the time of the slowest stage over the mean of all."""

    stages: tuple[Stage, ...]
    balance: float

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of each stage, by ``COLUMNS``."""
        return [
            (
                str(one.stage), one.first or "(model)", one.last or "(model)", count_text(one.parameters),
                f"{one.flops_share:.1%}", f"{one.time_share:.1%}", _size(one.state_bytes),
                _size(one.activation_bytes), _size(one.memory_bytes), _size(one.sent_bytes),
            )
            for one in self.stages
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {"balance": self.balance, "stages": [asdict(one) for one in self.stages]}

    def __str__(self) -> str:
        rows = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        sides = [str.ljust if name in ("from", "to") else str.rjust for name in COLUMNS]
        lines = ["  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"slowest stage over mean: {self.balance:.3f}"])


def describe_stages(
    program: Program,
    assignment: Assignment,
    in_flight: Sequence[int] | None = None,
    *,
    machine: Machine = ACCELERATOR,
) -> StageTable:
    """The stages of ``assignment``, which belongs to ``program``.

    ``in_flight``: for each stage, the most microbatches whose activations it holds at once; None: one.
    """
    calls = [node for node in program.graph.nodes if node in assignment.stage_of]
    graph = StageGraph(program, assignment.duplicated, sorted(calls, key=assignment.stage_of.__getitem__), machine)
    counts = [0] * (1 + max(assignment.stage_of.values(), default=0))
    for node in calls:
        counts[assignment.stage_of[node]] += 1
    bounds = [0, *itertools.accumulate(counts)]
    tables = graph.tables(bounds)
    flights = in_flight or (1,) * len(counts)
    flops = [sum(map(graph.costs.flops, graph.nodes[a:b])) for a, b in zip(bounds, bounds[1:])]
    seconds = [float(tables.seconds[n, n + 1]) for n in range(len(counts))]
    sent, received = _messages(graph, bounds)
    stages = []
    for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
        state, saved = int(tables.state[n, n + 1]), int(tables.saved[n, n + 1])
        stages.append(
            Stage(
                n, *_modules(graph.nodes[a:b]), _parameters(graph, a, b), flops[n], seconds[n],
                flops[n] / max(1, sum(flops)), seconds[n] / (sum(seconds) or 1.0),
                state, saved, state + flights[n] * saved, sent[n], received[n],
            )
        )  # fmt: skip
    return StageTable(tuple(stages), max(seconds) * len(seconds) / (sum(seconds) or 1.0))


def _messages(graph: StageGraph, bounds: Sequence[int]) -> tuple[list[int], list[int]]:
    """Bytes that each stage sends and receives, forward: a value once to each stage that uses it."""
    stage_at = [n for n, (a, b) in enumerate(zip(bounds, bounds[1:])) for _ in range(a, b)]
    sent, received = [0] * (len(bounds) - 1), [0] * (len(bounds) - 1)
    for node in graph.nodes:
        here = stage_at[graph.place[node]]
        for stage in {stage_at[use] for use in graph.uses[node]} - {here}:
            size = graph.costs.bytes([node])
            sent[here] += size
            received[stage] += size
    return sent, received


def _modules(nodes: Sequence[fx.Node]) -> tuple[str, str]:
    found = [origin(node).module for node in nodes]
    return (found[0], found[-1]) if found else ("", "")


def _parameters(graph: StageGraph, begin: int, end: int) -> int:
    table = graph.program.placeholders(InputKind.PARAMETER)
    return sum(graph.elements(node) for node, _ in table if any(begin <= use < end for use in graph.uses[node]))


def _size(number: int) -> str:
    return size_text(number) if number else "0 B"
