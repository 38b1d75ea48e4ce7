"""A graph as the storages that it makes, holds and lets go of, line by line: walked once, then played many times.

linear = aten.linear(x, w)       makes storage 2 (128 bytes) and holds it; lets go of x
view   = aten.view(linear, ..)   holds storage 2 once more; lets go of linear
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from autopar.ir import collectives as comm
from autopar.ir.node import Node, last_uses, repeated
from autopar.memory.account import GATHERED, GRADIENTS, IN_FLIGHT, PARAMETERS, Account
from autopar.memory.gradients import gradients_in
from autopar.memory.shapes import Form, Held, Made, New, Operators
from autopar.mesh import Coordinates, Mesh
from autopar.operators.routing import RECEIVED_IDS

WAIT = comm.OPS.wait.default
ALIKE_ALONE = ("all_reduce", "keep_first", "shift")  # on an axis of one rank they give what they take
WEIGHTS = frozenset({PARAMETERS, GATHERED})


@dataclass(frozen=True)
class Line:
    """One node of a graph. Storages are numbered: those of the inputs first, then those that lines make."""

    node: Node
    makes: tuple[tuple[int, int], ...]  # kind and bytes of new storages
    holds: tuple[int, ...]
    settles: tuple[tuple[int, int], ...]  # a storage that has arrived, and its kind
    drops: tuple[int, ...]


@dataclass(frozen=True)
class Tape:
    lines: tuple[Line, ...]
    results: tuple[Held, ...]

    def play(self, account: Account, inputs: Sequence[Held]) -> list[Held]:
        """The results, which ``account`` then holds; it holds inputs from their line to their last use."""
        numbers = [one.storage for one in inputs]
        for line in self.lines:
            numbers += [account.new(share) for share in line.makes]
            account.hold([numbers[place] for place in line.holds], line.node)
            for place, kind in line.settles:
                account.settle(numbers[place], kind)
            account.release([numbers[place] for place in line.drops])
        return [Held(one.form, numbers[one.storage]) for one in self.results]


class Tapes:
    """The tapes of graphs, as a rank at ``here`` runs them, by the forms and kinds of what they take."""

    def __init__(
        self, mesh: Mesh, here: Coordinates, operators: Operators | None = None, *, uneven: bool = False
    ) -> None:
        """``uneven``: the rank has the experts that all tokens choose, so that all rows arrive at it."""
        self.mesh, self.here, self.operators, self.uneven = mesh, here, operators or Operators(), uneven
        self._known: dict[Any, tuple[fx.Graph, Tape]] = {}

    def run(
        self, graph: fx.Graph, account: Account, inputs: Sequence[Held], kind: int, at_once: int | None = None
    ) -> list[Held]:
        """Play ``graph``. ``kind``: that of what it makes, but for weights and gradients of parameters.

        ``at_once``: how many of its results come first that are no gradients of parameters; None: all.
        """
        key = (id(graph), kind, at_once, *((one.form, account.kind(one.storage)) for one in inputs))
        if key not in self._known:
            forms = [(one.form, account.kind(one.storage)) for one in inputs]
            self._known[key] = graph, _Writer(self, graph, forms, kind, at_once).tape()
        return self._known[key][1].play(account, inputs)


class _Writer:
    """One tape being written."""

    def __init__(
        self, tapes: Tapes, graph: fx.Graph, inputs: Sequence[tuple[Form, int]], kind: int, at_once: int | None
    ) -> None:
        self.tapes, self.graph, self.kind = tapes, graph, kind
        self.gradients = gradients_in(graph, at_once) if at_once is not None else frozenset[Node]()
        self.kinds = [kind for _, kind in inputs]  # of each storage, once it has arrived
        self.given = [Held(form, place) for place, (form, _) in enumerate(inputs)]
        self.known: dict[Node, Any] = {}

    def tape(self) -> Tape:
        lines, dying, waiting = [], last_uses(self.graph), self.given[::-1]
        for node in self.graph.nodes:
            if node.op == "output":
                results = list(node.args[0])
                again = tuple(place for result in repeated(results) for place in _storages(self.known[result]))
                lines.append(Line(node, (), again, (), ()))
                return Tape(tuple(lines), tuple(self.known[result] for result in results))
            before = len(self.kinds)
            self.flying = False
            sizes: list[int] = []
            self.known[node] = waiting.pop() if node.op == "placeholder" else self._called(node, sizes)
            made = [IN_FLIGHT if self.flying else kind for kind in self.kinds[before:]]
            holds = tuple(_storages(self.known[node]))
            drops = tuple(place for dead in dying.get(node, ()) for place in _storages(self.known[dead]))
            arrived = node.target is WAIT and self._started(node)
            settles = tuple((place, self.kinds[place]) for place in holds) if arrived else ()
            lines.append(Line(node, tuple(zip(made, sizes)), holds, settles, drops))
            for dead in dying.get(node, ()):
                del self.known[dead]
        raise AssertionError("a graph ends with its output")

    def _called(self, node: Node, sizes: list[int]) -> Any:
        """The results of a call; ``sizes`` gets the bytes of the storages that it makes."""
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known.__getitem__)  # type: ignore[assignment]
        if node.target is operator.getitem:
            return args[0][args[1]]
        if self._passes_on(node):
            source: Held = args[0]
            if node.target in comm.IDENTITIES or node.target is WAIT or source.form.is_contiguous:
                return source
        results, taken = self.tapes.operators.results(node, args, kwargs)
        if self.tapes.uneven:
            results = pytree.tree_map(lambda leaf: _resized(leaf, *_share(node, taken)), results)
        first, new = len(self.kinds), dict[int, int]()

        def held(leaf: Any) -> Any:
            if not isinstance(leaf, Made):
                return leaf
            if not isinstance(leaf.source, New):
                return Held(leaf.form, taken[leaf.source].storage)
            new[leaf.source.number] = leaf.source.bytes
            return Held(leaf.form, first + leaf.source.number)

        found = pytree.tree_map(held, results)
        self.flying = node.target in comm.TARGETS and comm.TARGETS[node.target] in comm.STARTED
        sizes += [new[number] for number in range(len(new))]
        self.kinds += [self._kind(node, taken)] * len(new)
        return found

    def _kind(self, node: Node, taken: Sequence[Held]) -> int:
        if taken and all(self.kinds[one.storage] in WEIGHTS for one in taken):
            return GATHERED
        return GRADIENTS if node in self.gradients else self.kind

    def _passes_on(self, node: Node) -> bool:
        """Whether a collective gives what it takes, as the simulator does."""
        name = comm.TARGETS.get(node.target)  # type: ignore[call-overload]
        if name is None or name == "axis_index":
            return False
        if node.target is WAIT or node.target in comm.IDENTITIES:
            return True
        axis, base = str(comm.arguments_of(node)["axis"]), comm.STARTED.get(name, name)
        if base == "keep_first" and not self.tapes.mesh.position(axis, self.tapes.here):
            return True
        return self.tapes.mesh.size(axis) == 1 and base in ALIKE_ALONE

    def _started(self, node: Node) -> bool:
        (source,) = node.all_input_nodes
        return comm.TARGETS.get(source.target) in comm.STARTED and not self._passes_on(source)  # type: ignore[call-overload]


def _share(node: Node, taken: Sequence[Held]) -> tuple[int, int]:
    """By how much more rows there are than with an even load where all go to one rank: (times, divided by)."""
    name = comm.TARGETS.get(node.target)  # type: ignore[call-overload]
    if node.target is RECEIVED_IDS:
        return taken[0].form.shape[0], 1
    base = None if name is None else comm.STARTED.get(name, name)
    if base not in ("dispatch_rows", "return_rows"):
        return 1, 1
    ways = int(comm.arguments_of(node)["ways"])
    return (ways, 1) if base == "dispatch_rows" else (1, ways)


def _resized(leaf: Any, times: int, by: int) -> Any:
    """``leaf`` with more rows, or fewer."""
    if not isinstance(leaf, Made) or times == by or not isinstance(leaf.source, New):
        return leaf
    rows, *rest = leaf.form.shape
    form = Form((rows * times // by, *rest), leaf.form.strides, leaf.form.dtype)
    return Made(form, New(leaf.source.number, leaf.source.bytes * times // by))


def _storages(value: Any) -> Iterator[int]:
    if isinstance(value, Held):
        yield value.storage
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
