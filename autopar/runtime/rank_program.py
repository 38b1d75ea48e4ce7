"""A rank's program compiled, and bound to the tensors of a module: local tensors in, local tensors out.

In a step :class:`BoundProgram` fetches the local tensors of inputs and parameters, calls the Python of the graph that
is asked for (:mod:`rank_graphs` has them), and writes new values of buffers back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from autopar.autodiff.autograd import below_autograd, is_autocasting
from autopar.autodiff.hoist import Gathers
from autopar.communication.connect import Connection
from autopar.communication.labelled import Labelled
from autopar.communication.pieces import padded
from autopar.communication.recorder import Named
from autopar.dtensors.dtensor import local_of, locals_of
from autopar.errors import AutoparError, InvariantError
from autopar.ir.own_memory import origin_of_memory
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.stored_graph import Port
from autopar.ir.tables import Input, InputKind, OutputKind, join_key
from autopar.pipeline.microbatches import NewBuffers
from autopar.runtime.giving import Give, Giver
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import FORWARD, LEARN
from autopar.weights.absent import Table
from autopar.weights.border import joined, part_of, trimmed
from autopar.weights.parameters import tables
from autopar.weights.resident_parameters import Gathered

Span = tuple[int, int, int, int]  # storage, first byte, byte after the last, position of the tensor
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Step:
    """One call: the user's tensors, the seed, the values sent by other pipeline stages, and the program's results.

    ``learns``: of the outputs for users, the loss alone is wanted. ``wholes``: of the batch that this is a part of, and
    ``buffers`` takes what its parts write into those.
    """

    __slots__ = ("buffers", "learns", "received", "returned", "seed", "tensors", "wholes")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        seed: int,
        received: Mapping[str, Tensor] = NOTHING,
        learns: bool = False,
        wholes: Mapping[str, Tensor] = NOTHING,
        buffers: NewBuffers | None = None,
    ) -> None:
        self.tensors, self.seed, self.received, self.learns, self.wholes = tensors, seed, received, learns, wholes
        self.buffers = buffers
        self.returned: Sequence[Any] = ()


Fetch = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Held:
    """Fetches the local tensor of a parameter or buffer as it is."""

    table: Table
    key: str

    def __call__(self, step: Step) -> Tensor:
        return local_of(self.table[self.key])


class BoundProgram:
    """A program compiled for this rank and bound to the tensors of a module; a rank runs its ``graphs``.

    ``whole``: that of which ``program`` is a stage: it knows what others write, and how microbatches are joined.

    Raises InvariantError where the program and the module do not fit together, or a graph cannot be written as Python.
    """

    def __init__(
        self,
        program: Program,
        code: RankCode,
        root: nn.Module,
        connection: Connection,
        whole: PipelinedProgram | None = None,
    ) -> None:
        self.program, self.code, self.graphs, self.comm = program, code, code.graphs, connection.comm
        self.role = code.program.required_role
        if program.plan.compile == "inductor":
            from autopar.inductor.functions import refuse_without_compiler

            refuse_without_compiler(self.comm.device)
        self.comm.open(code.axes)
        self.slots: dict[str, tuple[Table, str]] = {name: (table, key) for _, table, key, name in tables(root)}
        self.entries = list(program.takes(*InputKind))
        self.users = [entry.target for _, entry in self.entries if entry.kind is InputKind.INPUT]
        known = program if whole is None else whole
        self._written = known.written_buffers
        self._updates = [
            (position, *self.slots[entry.target], known.joins.get(join_key(entry)))
            for position, entry in enumerate(program.outputs)
            if entry.kind is OutputKind.BUFFER_UPDATE
        ]
        fetch = [self._fetcher(port, entry) for port, entry in self.entries]
        leading = takewhile(lambda one: isinstance(one, Held), fetch)
        self._first = [(one.table, one.key) for one in leading if isinstance(one, Held)]
        self._fetch = fetch[len(self._first) :]
        self._gathered = code.resident
        for name, gathering in self.graphs.gathered.items():
            if name not in self._gathered:
                self._gathered[name] = self._gather(gathering)
        self._lent: dict[str, set[int]] = {}  # outputs that users are given in memory of their own, known after a run
        self._shared: dict[str, list[int]] = {}  # results that share memory, known after the first backward

    def resident(self) -> list[tuple[str, Tensor]]:
        """The whole parameters that stay between steps, each with the name of that which is a piece of it."""
        held = self._gathered.get(FORWARD)
        targets = {entry.node: entry.target for _, entry in self.entries if entry.kind is InputKind.PARAMETER}
        return [(targets[node], whole) for node, whole in held.wholes()] if held is not None else []

    def behind(self) -> list[str]:
        """The parameters of which whole ones stay, with other numbers than the parts that scripts have been shown."""
        targets = {entry.node: entry.target for _, entry in self.entries if entry.kind is InputKind.PARAMETER}
        return list(dict.fromkeys(targets[node] for held in self._gathered.values() for node in held.behind()))

    # ------------------------------------------------------------ running

    def own(self, name: str, given: list[Any]) -> list[Tensor]:
        """The results of the function ``name``, each tensor in memory of its own."""
        found = list(self.results(name, given))
        if name not in self._shared:
            self._shared[name] = sharing(self.code.passed_on(name), found)
        for position in self._shared[name]:
            found[position] = found[position].clone()
        return found

    def call(self, name: str, step: Step) -> tuple[Any, ...]:
        """Run ``name``, keep its outputs in ``step``, write buffer updates back; gives the results after outputs."""
        self.comm.phase = FORWARD if name == LEARN else name
        inputs = locals_of(self._first)
        inputs += [fetch(step) for fetch in self._fetch]
        resident = self._gathered.get(FORWARD if name == LEARN else name)
        if resident is not None:
            inputs += resident.tensors()
        taken = [_span(each, 0) for each in inputs if isinstance(each, Tensor)] if name not in self._lent else []
        if is_autocasting() and torch.is_autocast_enabled(self.comm.device.type):
            with torch.autocast(self.comm.device.type, enabled=False), below_autograd():
                found = self.results(name, inputs)
        else:
            with below_autograd():
                found = self.results(name, inputs)
        count = len(self.program.outputs)
        step.returned = found[:count]
        if name not in self._lent:
            self._lent[name] = lent(self.program, step.returned, taken)
        if self._lent[name]:
            step.returned = [each.clone() if at in self._lent[name] else each for at, each in enumerate(step.returned)]
        for position, table, key, join in self._updates:
            buffer = local_of(table[key])
            made = trimmed(step.returned[position], buffer.shape)
            if join is None or step.buffers is None:
                buffer.copy_(made)
            else:
                step.buffers.add(buffer, made, join)
        return found[count:]

    def results(self, name: str, given: list[Any]) -> tuple[Any, ...]:
        """The results of the function ``name``; noted, where the step is recorded."""
        if self.comm.is_profiled:
            return self.code.function(name, labelled=True)(Labelled(self.comm), given)
        function, recorder = self.code.function(name), self.comm.recorder
        if recorder is None:
            return function(self.comm, given)
        with recorder.running(name):
            return function(Named(self.comm, recorder, self.code.graph(name)), given)

    # ------------------------------------------------------------ binding

    def _fetcher(self, port: Port, entry: Input) -> Fetch:
        """A function that finds the local tensor of one placeholder."""
        layout, comm = port.value.layout, self.comm
        if entry.kind is InputKind.SEED:
            return lambda step: torch.tensor(step.seed, device=comm.device)
        if entry.kind is InputKind.WHOLE:
            return lambda step: step.wholes[entry.target].to(comm.device)
        if entry.kind is InputKind.CONSTANT:
            constant = part_of(layout, comm)(self.program.constants[entry.target])
            return lambda step: constant
        if entry.kind is InputKind.INPUT:
            position = self.users.index(entry.target)
            part = part_of(layout, comm, is_local=self.program.plan.inputs == "local")
            return lambda step: part(step.tensors[position])
        if entry.kind is InputKind.RECEIVED:
            return lambda step: step.received[entry.target]
        table, key = self._slot(entry.target)
        if local_of(table[key]).is_meta:
            raise AutoparError(
                f"'{entry.target}' has no data: the model was built on the meta device\n"
                "Way out: model.to_empty(device=...), then model.load_state_dict(...) or your own initialisation."
            )
        shape = layout.local_shape(comm.mesh)
        if port.is_used and tuple(local_of(table[key]).shape) != shape:
            return lambda step: padded(local_of(table[key]), shape)
        if (
            any(updated is table and name == key for _, updated, name, _ in self._updates)
            or entry.target in self._written
        ):
            return lambda step: local_of(table[key]).clone()  # forward may save it, and then it is written to
        return Held(table, key)

    def _gather(self, gathering: Gathers) -> Gathered:
        targets = {entry.node: entry.target for _, entry in self.entries if entry.kind is InputKind.PARAMETER}
        finds = [partial(dict.__getitem__, *self.slots[targets[node]]) for node in gathering.parameters]
        return Gathered(gathering, finds, self.comm)

    def _slot(self, target: str) -> tuple[Table, str]:
        if target not in self.slots:
            raise InvariantError(f"the program takes '{target}', which the model does not have")
        return self.slots[target]

    def giver(self, target: str) -> Give:
        """A function that makes a local gradient the gradient of the tensor ``target``."""
        if target not in self.slots:
            layout = next(port.value.layout for port, entry in self.entries if entry.target == target)
            is_local = self.program.plan.inputs == "local"
            return lambda grad, _: grad if is_local else joined(grad, layout, self.comm)
        return Giver(*self.slots[target])


def lent(program: Program, returned: Sequence[Any], taken: Sequence[Span]) -> set[int]:
    """Positions of outputs, ``returned``, in memory that is not theirs in the model: what users write there would be
    seen in another output, or in a tensor that the graph has taken, at the spans ``taken``."""
    spans = {
        at: _span(tensor, at)
        for at, (entry, tensor) in enumerate(zip(program.outputs, returned))
        if entry.kind is OutputKind.USER and isinstance(tensor, Tensor)
    }
    storages = {span[0] for span in spans.values()}
    if len(storages) == len(spans) and storages.isdisjoint(
        span[0] for span in taken
    ):  # nodes, which a program from the cache need not have, are not asked
        return set()
    found, given = set[int](), list[tuple[Node, Span]]()
    constants, nodes = {node for node, _ in program.placeholders(InputKind.CONSTANT)}, program.returned
    for at, span in spans.items():
        origin = origin_of_memory(nodes[at])
        is_own = origin.op != "placeholder" or origin in constants
        others = [other for one, other in given if one is not origin] + (list(taken) if is_own else [])
        if any(_overlap(span, other) for other in others):
            found.add(at)
        else:
            given.append((origin, span))
    return found


def _overlap(one: Span, other: Span) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


def sharing(passed_on: Iterable[int], found: Sequence[Tensor]) -> list[int]:
    """Positions of results of a graph that share memory with an input (those ``passed_on``) or with another result.

    ``found``: the results. As gradients they need memory of their own: they are scaled and added to in place. Slices of
    one bucket do not overlap and may stay.
    """
    shared = set(passed_on)
    last: dict[int, tuple[int, int]] = {}  # storage -> (end, position) of the result before, in order of memory
    for pointer, start, end, position in sorted(_span(tensor, i) for i, tensor in enumerate(found)):
        before, other = last.get(pointer, (0, position))
        if start < before:
            shared |= {position, other}
        last[pointer] = max((before, other), (end, position))
    return sorted(shared)


def _span(tensor: Tensor, position: int) -> Span:
    start = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    end = start + (reach * tensor.element_size() if tensor.numel() else 0)
    return tensor.untyped_storage().data_ptr(), start, end, position
