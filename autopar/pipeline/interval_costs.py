"""A forward program as a sequence that can be cut into pipeline stages, and the cost of each interval of it.

The sequence holds the calls in the order of the trace, except that calls that depend on placeholders alone (the
decoder's embedding of an encoder-decoder) are just before their first use, so that their result does not travel through
the stages in between. Values that stages duplicate belong to no place in it; they cost each stage that uses them. A
message goes directly from the stage that makes a value to each stage that uses it.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx

from autopar.cost.kept_values import SavedValues
from autopar.cost.machine import ACCELERATOR, Machine
from autopar.cost.roofline import Costs
from autopar.ir import collectives as comm
from autopar.ir.node import value, values
from autopar.ir.program import Program
from autopar.ir.reach import descendants
from autopar.ir.tables import InputKind
from autopar.mesh import REPLICA_AXES
from autopar.pipeline.duplicated import duplicated_nodes
from autopar.pipeline.intervals import Event, Table, events_of, totals

ADAM_STATES = 2  # moments of each parameter, in its dtype
MOST_PLACES = 2000  # a table has the square of it: 32 MB


class StageGraph:
    """``nodes`` in the order in which they are cut, and the ``duplicated`` ones; both are found unless given."""

    def __init__(
        self,
        program: Program,
        duplicated: frozenset[fx.Node] | None = None,
        nodes: Sequence[fx.Node] | None = None,
        machine: Machine = ACCELERATOR,
    ) -> None:
        self.program, self.costs = program, Costs(program, machine)
        self.duplicated = duplicated_nodes(program, self.costs) if duplicated is None else duplicated
        self._parameters = {node for node, _ in program.placeholders(InputKind.PARAMETER)}
        self.nodes = tuple(nodes) if nodes is not None else in_cutting_order(program, self.duplicated)
        self.place = {node: position for position, node in enumerate(self.nodes)}
        self.uses = self._uses()
        self.seconds = {node: self._seconds(node) for node in (*self.nodes, *self.duplicated)}

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def loss(self) -> int:
        """The place of the loss; without a loss, that of the last output.

        The last stage makes the loss, with the sums and counts of which it is the quotient (they are the weights of the
        microbatches). What no input has a part in, as a counter of steps, may come from any.
        """
        results = self.program.returned
        wanted = results if self.program.loss is None else results[self.program.loss : self.program.loss + 1]
        if self.program.loss is None:
            return max((self.place[node] for node in wanted if node in self.place), default=len(self) - 1)
        first, ahead = len(self) - 1, list(wanted)
        of_inputs = descendants(node for node, _ in self.program.placeholders(InputKind.INPUT))
        while ahead:
            node = ahead.pop()
            if node in self.place and node in of_inputs and all(not kind.shape for kind in values(node)):
                first = min(first, self.place[node])
                ahead += node.all_input_nodes
        return first

    @property
    def most_stages(self) -> int:
        """The number of calls that compute something, up to the loss: one for each stage."""
        return sum(map(self.works, self.nodes[: self.loss + 1]))

    @cached_property
    def crossing(self) -> list[int]:
        """For each place, the bytes of the values made before it and used after it, each counted once."""
        steps = [0] * (len(self) + 1)
        for node in self.nodes:
            last = max(self.uses[node], default=0)
            if last > self.place[node]:
                size = self.costs.bytes([node])
                steps[self.place[node] + 1] += size
                steps[last + 1] -= size
        for position in range(len(self)):
            steps[position + 1] += steps[position]
        return steps[: len(self)]

    @cached_property
    def within_experts(self) -> frozenset[int]:
        """The places that values of a ragged size would cross: a message between stages has a fixed size."""
        ragged = (node for node in self.nodes if any(kind.layout.ragged for kind in values(node)))
        spans = (range(self.place[node] + 1, max(self.uses[node], default=0) + 1) for node in ragged)
        return frozenset(itertools.chain.from_iterable(spans))

    @cached_property
    def places_to_cut(self) -> list[int]:
        """Among cut points with no computation between them, the one fewest bytes cross; in a program of more than
        ``MOST_PLACES`` calls that compute, with few such calls between them.

        Never splits a tuple, nor what a rank does with rows for its experts.
        """
        best: dict[int, int] = {}
        computed = 0
        together = max(1, -(-sum(self.seconds[node] > 0 for node in self.nodes) // MOST_PLACES))
        for position, node in enumerate(self.nodes):
            if position and node.target is not operator.getitem and position not in self.within_experts:
                found = best.setdefault(computed // together, position)
                best[computed // together] = min(found, position, key=lambda place: (self.crossing[place], place))
            computed += self.seconds[node] > 0
        return sorted(best.values())

    def tables(self, bounds: Sequence[int]) -> Tables:
        """Costs of the intervals between ``bounds``, which begin with 0 and end with ``len(self)``."""
        return Tables(self, bounds)

    @cached_property
    def states(self) -> Mapping[fx.Node, int]:
        """Bytes that a rank holds for each parameter (``Plan.zero`` splits some of them), and for each buffer."""
        found: dict[fx.Node, int] = {}
        for node, entry in self.program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
            part = self.costs.bytes([node])
            whole = max(part, self._gathered(node) * value(node).dtype.itemsize)
            zero = self.program.plan.zero
            held = part if zero == 3 else whole
            trained = entry.kind is InputKind.PARAMETER and value(node).requires_grad
            gradient = part if zero >= 2 else whole
            found[node] = held + (gradient + ADAM_STATES * part if trained else 0)
        return found

    @cached_property
    def keepers(self) -> Mapping[fx.Node, list[int]]:
        """The values that backward keeps, and the places of the calls that keep them."""
        found: dict[fx.Node, list[int]] = defaultdict(list)
        for node in self.nodes:
            for kept in self.saved_values.kept_by(node):
                found[kept].append(self.place[node])
        return found

    @cached_property
    def saved_values(self) -> SavedValues:
        return SavedValues(self.costs, {node for node in self.duplicated if self._is_parameter(node)})

    def _uses(self) -> dict[fx.Node, list[int]]:
        """The places where each value is used: by a call in the sequence, possibly through duplicated ones."""
        found: dict[fx.Node, set[int]] = defaultdict(set)
        for node in self.program.returned:
            if node in self.duplicated:
                found[node].add(len(self.nodes) - 1)  # the last stage returns it
        for node in reversed(self.program.graph.nodes):
            if node.op != "output":
                for user in node.users:
                    found[node] |= {self.place[user]} if user in self.place else found[user]
        return {node: sorted(places) for node, places in found.items()}

    def _seconds(self, node: fx.Node) -> float:
        """The seconds of a call; work on parameters once a step is shared by its microbatches."""
        once = node in self.duplicated and self._is_parameter(node) and self.program.plan.zero < 3
        return self.costs.both(node) / (self.program.plan.microbatches if once else 1)

    def _is_parameter(self, node: fx.Node) -> bool:
        """Whether ``node`` is a parameter, or a cast or gathered one."""
        while node in self.duplicated and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node in self._parameters

    def works(self, node: fx.Node) -> bool:
        """Whether ``node`` computes something: no view, no collective."""
        return self.seconds[node] > 0 and node.target not in comm.TARGETS

    def _gathered(self, node: fx.Node) -> int:
        """Elements of a parameter that is gathered over a data axis before its use; 0 for others."""
        for user in node.users:
            if user in self.duplicated and user.target in comm.GATHERS:
                return self.elements(user) if comm.axes_over(user).issubset(REPLICA_AXES) else 0
            if user in self.duplicated and self._is_parameter(user):
                found = self._gathered(user)
                if found:
                    return found
        return 0

    def elements(self, node: fx.Node) -> int:
        kind = value(node)
        return self.costs.bytes([node]) // kind.dtype.itemsize


class Tables:
    """For positions a < b of ``bounds``, the costs of the calls from ``bounds[a]`` to ``bounds[b]`` as a stage."""

    def __init__(self, graph: StageGraph, bounds: Sequence[int]) -> None:
        self.graph, self.bounds = graph, bounds

    @cached_property
    def seconds(self) -> Table:
        """Seconds of one microbatch, forward and backward: of its calls or of its messages, whichever is longer."""
        graph = self.graph
        events = [(-1, graph.place[node], graph.seconds[node]) for node in graph.nodes]
        for node in graph.duplicated:
            events += events_of(graph.uses[node], graph.seconds[node])
        found = totals(events, self.bounds)
        return np.maximum(found, self.received / graph.costs.machine.link, out=found)

    @cached_property
    def received(self) -> Table:
        """Bytes received, with those of the gradients that are sent back."""
        graph, events = self.graph, list[Event]()
        for node in graph.nodes:
            here = graph.place[node]
            later = [use for use in graph.uses[node] if use > here]
            if later:
                ways = 2 if any(kind.requires_grad for kind in values(node)) else 1
                events += events_of(later, ways * graph.costs.bytes([node]), since=here)
        return totals(events, self.bounds)

    @cached_property
    def works(self) -> NDArray[np.bool_]:
        """Whether some call computes something."""
        steps = np.array([0, *itertools.accumulate(map(self.graph.works, self.graph.nodes))])[np.asarray(self.bounds)]
        return np.asarray(steps[:, None] < steps[None, :])

    @cached_property
    def state(self) -> Table:
        """Bytes of parameters, gradients and optimizer states."""
        uses = self.graph.uses
        sizes = {node: size for node, size in self.graph.states.items() if node in uses}  # a buffer may be unused
        events = [event for node, size in sizes.items() for event in events_of(uses[node], size)]
        return totals(events, self.bounds)

    @cached_property
    def owns(self) -> NDArray[np.bool_]:
        """Whether some parameter is used there: an optimizer of torch refuses a rank that holds none."""
        graph = self.graph
        used = [node for node, _ in graph.program.placeholders(InputKind.PARAMETER) if node in graph.uses]
        events = [event for node in used for event in events_of(graph.uses[node], 1.0)]
        return np.asarray(totals(events, self.bounds) > 0)

    @cached_property
    def saved(self) -> Table:
        """Bytes that one microbatch keeps for its backward pass."""
        graph, share = self.graph, self.graph.saved_values.share
        events = [(-1, graph.place[node], graph.saved_values.inner_bytes(node) * share) for node in graph.nodes]
        for node, keepers in graph.keepers.items():
            events += events_of(keepers, graph.costs.bytes([node]) * share)
        return totals(events, self.bounds)


def in_cutting_order(program: Program, duplicated: frozenset[fx.Node]) -> tuple[fx.Node, ...]:
    """The calls that are not ``duplicated``, each after its operands; the parts of a tuple directly after it."""
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node not in duplicated]
    trace = {node: position for position, node in enumerate(calls)}
    light: set[fx.Node] = set()  # one chain from placeholders to one use
    for node in calls:
        sources = [source for source in node.all_input_nodes if source in trace]
        if all(source in light and len(source.users) == 1 for source in sources):
            light.add(node)
    when = dict(trace)
    for node in reversed(calls):
        users = [when[user] for user in node.users if user in when]
        if node in light and users:
            when[node] = min(users)
    for node in calls:
        if node.target is operator.getitem:
            when[node] = when[node.all_input_nodes[0]]

    def place(node: fx.Node) -> tuple[int, int, int]:
        """The time at which it runs; calls of one time keep the order of the trace, parts of a tuple stay with it."""
        behind = node.all_input_nodes[0] if node.target is operator.getitem else node
        return when[node], trace[behind], trace[node]

    return tuple(sorted(calls, key=place))
