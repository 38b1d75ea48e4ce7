"""The operations of one rank in a training step, in the order in which it issues them, each with what it comes after.

    h = aten.linear(x, u)                0 compute     h
    s = comm.start_all_reduce(h, tp)     1 collective  s   uses 0
    g = aten.gelu(x)               -->   2 compute     g   after 0
    w = comm.wait(s, tp)
    y = aten.add(w, g)                   3 compute     y   uses 1 and 2

A rank computes one operation after the other. Collectives of one group run in the order in which they are issued, after
all that was computed before they were; what is computed after a ``wait`` runs after the collective. The ranks of one
role, which is a position on the pipeline, have the same operations: peers are said relative to the rank. Views, and
collectives that send nothing, are no operations. On a pipeline all microbatches count as the first, as they do in
:mod:`autopar.analysis.footprint`; adding up their gradients is not counted.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.cost.roofline import Costs
from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, output_node, value
from autopar.ir.program import Program
from autopar.ir.text import operator_name
from autopar.ir.traffic import bytes_of, moved_bytes
from autopar.mesh import PIPELINE

Uses = frozenset[int]  # the operations that make a value, by their numbers
NOTHING: Uses = frozenset()
WAIT = comm.OPS.wait.default


class What(enum.StrEnum):
    """What a rank does in an operation."""

    COMPUTE = "compute"
    COLLECTIVE = "collective"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a rank.

    Attributes:
        name: of its node, or the message: ``F0.3 -> 1``.
        run: what it belongs to: ``forward``, ``backward``; of a pipeline ``F0.3``, ``reduce 0``.
        phase: ``forward`` or ``backward``, as in :class:`autopar.ir.traffic.Transfer`.
        uses: the operations that make its operands.
        after: operations that it follows without using their results.
        seconds: by the roofline model (:mod:`autopar.cost.roofline`).
        flops: floating-point operations of a compute.
        bytes: read and written by a compute; the operand of a collective on this rank; the size of a message.
        sent: the bytes that this rank sends.
        kind: of a compute its operator; the name of a collective in the table; of a message ``send`` or ``receive``.
        axis: the group of a collective or message.
        step: of a message, and of a shift: the position of the peer on ``axis`` less that of the rank.
        tag: of a message, and of a shift: the same number at both ends, and once for each pair of ranks.
        module: of the user's model.
    """

    what: What
    name: str
    run: str
    phase: str
    uses: Uses
    after: Uses
    seconds: float
    flops: int = 0
    bytes: int = 0
    sent: int = 0
    kind: str = ""
    axis: str = ""
    step: int = 0
    tag: int = 0
    module: str = ""

    @property
    def is_uneven(self) -> bool:
        """Whether the bytes are those of a balanced load, and the real ones are known at run time only."""
        return self.kind in UNEVEN


UNEVEN = ("dispatch_rows", "return_rows")


class Recording:
    """The operations of a rank as its graphs are gone through."""

    def __init__(self, machine: Machine = ACCELERATOR) -> None:
        self.machine = machine
        self.operations: list[Operation] = []
        self._before: Uses = NOTHING  # what the next compute comes after
        self._latest: dict[str, int] = {}  # group or channel -> its latest operation
        self._messages: dict[str, int] = {}  # channel -> how many until now
        self._shifts = 0

    def run(self, program: Program, graph: fx.Graph, given: Sequence[Uses], run: str, phase: str) -> list[Uses]:
        """Go through ``graph`` of ``program``; ``given`` is for its placeholders, in order. Gives its results."""
        costs, known, waiting = Costs(program, self.machine), dict[Node, Uses](), iter(given)
        for node in graph.nodes:
            if node.op == "placeholder":
                known[node] = next(waiting)
            elif node.op != "output":
                uses = NOTHING.union(*(known[source] for source in node.all_input_nodes))
                known[node] = self._call(costs, node, uses, run, phase)
        returned = output_node(graph).args[0]
        assert isinstance(returned, (tuple, list))
        return [known[node] if isinstance(node, Node) else NOTHING for node in returned]

    def message(self, what: What, name: str, run: str, uses: Uses, size: int, step: int, channel: str) -> Uses:
        """Add a message to or from another pipeline rank. What is computed next does not wait for it."""
        phase = "forward" if name.startswith("F") else "backward"
        self._messages[channel] = tag = self._messages.get(channel, 0) + 1
        seconds = self.machine.latency + size / self.machine.link
        sent = size if what is What.SEND else 0
        made = self._add(
            Operation(
                what, name, run, phase, uses, self._issued(channel) - uses, seconds,
                bytes=size, sent=sent, kind=what.value, axis=PIPELINE, step=step, tag=tag,
            )
        )  # fmt: skip
        (self._latest[channel],) = made
        return made

    def wait(self, uses: Uses) -> None:
        """What is computed next comes after collectives and messages among ``uses``."""
        self._before |= {number for number in uses if self.operations[number].what is not What.COMPUTE}

    def _call(self, costs: Costs, node: Node, uses: Uses, run: str, phase: str) -> Uses:
        """Add the operation of ``node``, if it is one. Gives the operations that make its result."""
        name = comm.moving(node.target)
        if name is not None and not comm.is_idle(node, costs.mesh):
            return self._collective(costs, node, name, uses, run, phase)
        if node.target is WAIT:
            self.wait(uses)
        seconds = costs.forward(node)
        if not seconds:
            return uses
        self._before = self._add(
            Operation(
                What.COMPUTE, node.name, run, phase, uses, self._before - uses, seconds,
                flops=costs.flops(node), bytes=costs.traffic(node), kind=operator_name(node.target),
                module=origin(node).module,
            )
        )  # fmt: skip
        return self._before

    def _collective(self, costs: Costs, node: Node, name: str, uses: Uses, run: str, phase: str) -> Uses:
        given = comm.arguments_of(node)
        axis, size = str(given["axis"]), bytes_of(value(given["x"]), costs.mesh)
        self._shifts += name == "shift"
        made = self._add(
            Operation(
                What.COLLECTIVE, node.name, run, phase, uses, self._issued(axis) - uses, costs.forward(node),
                bytes=size, sent=moved_bytes(name, costs.mesh.size(axis), size), kind=name, axis=axis,
                step=int(given.get("by", 0)), tag=self._shifts if name == "shift" else 0, module=origin(node).module,
            )
        )  # fmt: skip
        (self._latest[axis],) = made
        if comm.TARGETS[node.target] not in comm.STARTED:  # type: ignore[index]
            self._before = made
        return made

    def _issued(self, stream: str) -> Uses:
        """What an operation that is issued now, to a group or channel, comes after."""
        return self._before | ({self._latest[stream]} if stream in self._latest else NOTHING)

    def _add(self, operation: Operation) -> Uses:
        self.operations.append(operation)
        return frozenset({len(self.operations) - 1})
