"""Over which parts of the mesh a value differs from rank to rank: an abstract run of one graph, without any numbers.

    x: f32[4@dp,8]                     differs over dp
    w: f32[8,8]                        is the same everywhere
    linear = aten.linear(x, w)         differs over dp, as one of its operands does
    all_reduce = comm.all_reduce(linear, dp)    is the same everywhere

A value is the same on ranks whose operands are the same, whatever the operator; only collectives and the position of a
rank change that. (Rios et al. 2024, "varying manual axes" of JAX's shard_map, is the same idea.) No layout that a pass
has written is believed: only how ranks hold parameters, buffers and inputs is given.

Small tensors travel together: what comes out of one bucket differs as what was put into it, piece by piece.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.layout import Layout
from autopar.ir.node import Node, output_node, values
from autopar.ir.operator_facts import argument_names, is_random
from autopar.mesh import Digit, Mesh

aten = torch.ops.aten

SPREADS = (aten.expand.default, aten.full_like.default, aten.ones_like.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)

# backward operators -> for each result the places of the operands that it is computed from
SOURCES: dict[Any, tuple[tuple[int, ...], ...]] = {
    aten.convolution_backward.default: ((0, 2), (0, 1), (0,)),
    aten.native_layer_norm_backward.default: ((0, 1, 3, 4, 5), (0, 1, 3, 4), (0,)),
    aten.native_group_norm_backward.default: ((0, 1, 2, 3, 4), (0, 1, 2, 3), (0,)),
}

Atom = tuple[str, int, int]  # axis, stride, size: a part of the position on an axis
Over = frozenset[Atom]
Piece = tuple[int, int, Over]  # first and last column, and over what the values there differ

SAME: Over = frozenset()


@dataclass(frozen=True)
class Varying:
    """``pieces``: of a bucket, in order; columns are those of the last dim, which repeats them.

    ``spread``: it comes from one number that was put into many places, as the gradient of a mean is: ranks that hold
    the same may hold it for other rows, and their sum counts nothing twice. What ranks have summed is the same for all.

    ``placed``: over what it differs, or may, as it is computed from the position of the rank.
    """

    over: Over = SAME
    pieces: tuple[Piece, ...] = ()
    spread: bool = False
    placed: Over = SAME

    @property
    def period(self) -> int:
        return self.pieces[-1][1] if self.pieces else 0

    def changed(self, change: Callable[[Over], Over]) -> Varying:
        pieces = tuple((start, end, change(over)) for start, end, over in self.pieces)
        return Varying(change(self.over), pieces, self.spread, change(self.placed) & self.placed)


class Atoms:
    """The parts of the axes of a mesh that its groups distinguish: ``sp:inner2`` and ``sp:outer4`` are two of them."""

    def __init__(self, mesh: Mesh, groups: Iterable[str]) -> None:
        self.mesh = mesh
        edges: dict[str, set[int]] = {axis: {1, size} for axis, size in mesh.axes}
        for group in groups:
            for digit in mesh.digits(group):
                if digit.axis in edges:
                    edges[digit.axis] |= {digit.stride, digit.stride * digit.size}
        self._edges = {axis: sorted(found) for axis, found in edges.items()}
        self._known: dict[str, Over] = {}

    def of(self, group: str) -> Over:
        """The parts that a group is over; none where it has one rank."""
        if group not in self._known:
            self._known[group] = frozenset(atom for digit in self.mesh.digits(group) for atom in self._inside(digit))
        return self._known[group]

    def _inside(self, digit: Digit) -> Iterator[Atom]:
        edges = self._edges.get(digit.axis, [1])
        for low, high in zip(edges, edges[1:]):
            if digit.stride <= low and high <= digit.stride * digit.size:
                yield digit.axis, low, high // low

    def of_layout(self, layout: Layout) -> Over:
        """Over what a tensor of this layout differs; pending sums count."""
        groups = [*layout.groups, *(axis for axis, _ in layout.partial)]
        return SAME.union(*(self.of(group) for group in groups)) if groups else SAME

    def words(self, over: Over) -> str:
        names = dict.fromkeys(axis for axis, _ in self.mesh.axes if any(axis == atom[0] for atom in over))
        return ", ".join(names)


def groups_of(graphs: Iterable[fx.Graph]) -> set[str]:
    """The names of all groups that graphs speak of, in collectives and in layouts."""
    found: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            if node.target in comm.TARGETS:
                found.add(str(comm.arguments_of(node)["axis"]))
            for kind in values(node):
                found |= {*kind.layout.groups, *(axis for axis, _ in kind.layout.partial)}
    return found


def results_of(graph: fx.Graph) -> tuple[Node, ...]:
    """The nodes that a graph returns."""
    found: tuple[Node, ...] = tuple(output_node(graph).args[0])  # type: ignore[arg-type]
    return found


@dataclass
class AbstractRun:
    """One graph, run on what is known of its inputs. ``counted``: sums over ranks that hold the same, with the axes."""

    atoms: Atoms
    known: dict[Node, Varying] = field(default_factory=dict)
    counted: list[tuple[Node, Over]] = field(default_factory=list)

    def run(self, graph: fx.Graph, given: Sequence[Varying]) -> list[Varying]:
        """What is known of the results; ``given``: of each placeholder."""
        waiting = list(given)[::-1]
        for node in graph.nodes:
            if node.op == "placeholder":
                self.known[node] = waiting.pop()
            elif node.op == "call_function":
                self.known[node] = self._result(node)
        return [self.known[node] for node in results_of(graph)]

    def _result(self, node: Node) -> Varying:
        if node.target in comm.TARGETS:
            return self._collective(node)
        found = self._computed(node)
        sources = [self.known[one] for one in _sources(node)]
        spread = node.target in SPREADS or any(source.spread for source in sources)
        return replace(found, spread=spread, placed=SAME.union(*(source.placed for source in sources)))

    def _computed(self, node: Node) -> Varying:
        if _draws(node):
            return Varying(frozenset(atom for axis in self.atoms.mesh.names for atom in self.atoms.of(axis)))
        sources = [self.known[source] for source in _sources(node)]
        over = SAME.union(*(source.over for source in sources)) if sources else SAME
        if node.target is aten.cat.default:
            return Varying(over, self._joined(node))
        if len(sources) == 1 and sources[0].pieces:
            return self._of_bucket(node, sources[0])
        return Varying(over)

    # ------------------------------------------------------------ collectives

    def _collective(self, node: Node) -> Varying:
        name = comm.TARGETS[node.target]
        name = comm.STARTED.get(name, name)
        given = comm.arguments_of(node)
        over = self.atoms.of(str(given["axis"]))
        if name == "axis_index":
            return Varying(over, placed=over)
        source = self.known[node.all_input_nodes[0]]
        if name in ("wait", "tally") or not over:
            return source
        row = comm.row_of(name)
        if name in ("all_reduce", "reduce_scatter") and given.get("op", "sum") == "sum":
            self._count(node, source, over)
        if row.does_nothing:
            return source
        if name == "shift":
            return source
        if row.after in comm.WHOLE:
            return replace(self._kept(node, source).changed(lambda old: old - over), spread=False)
        return self._kept(node, source).changed(lambda old: old | over)

    def _count(self, node: Node, source: Varying, over: Over) -> None:
        for old in [old for _, _, old in source.pieces] or [source.over]:
            if not over <= old and not source.spread:
                self.counted.append((node, over - old))
                return

    def _kept(self, node: Node, source: Varying) -> Varying:
        """``source`` with its pieces, if the result still repeats them along its last dim."""
        last = self._sizes(node)[-1:]
        return source if source.pieces and last and last[0] % source.period == 0 else replace(source, pieces=())

    # ------------------------------------------------------------ buckets

    def _sizes(self, node: Node) -> tuple[int, ...]:
        kinds = values(node)
        return kinds[0].layout.local_shape(self.atoms.mesh) if len(kinds) == 1 else ()

    def _joined(self, node: Node) -> tuple[Piece, ...]:
        parts = node.args[0]
        assert isinstance(parts, Sequence)
        sizes = self._sizes(node)
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        if not sizes or dim % len(sizes) != len(sizes) - 1:
            return ()
        start, found = 0, []
        for part in parts:
            assert isinstance(part, Node)
            end = start + self._sizes(part)[-1]
            found.append((start, end, self.known[part].over))
            start = end
        return tuple(found)

    def _of_bucket(self, node: Node, source: Varying) -> Varying:
        before, sizes = self._sizes(node.all_input_nodes[0]), self._sizes(node)
        if node.target is aten.slice.Tensor and len(node.args) == 4 and before:
            _, dim, start, end = node.args
            assert isinstance(dim, int) and isinstance(start, int) and isinstance(end, int)
            if dim % len(before) == len(before) - 1:
                return Varying(_between(source, start, min(end, before[-1])))
        if node.target in VIEWS and sizes and before[-1] % source.period == 0 and sizes[-1] % source.period == 0:
            return source
        if node.target is not operator.getitem and sizes == before:
            return source  # element by element
        return Varying(source.over)


def _sources(node: Node) -> list[Node]:
    """The nodes that a node is computed from; of one of several results those of that."""
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, Node) and source.target in SOURCES:
        place: Any = node.args[1]
        return [given for at in SOURCES[source.target][place] if isinstance(given := source.args[at], Node)]
    return node.all_input_nodes


def _draws(node: Node) -> bool:
    """Whether a node draws random numbers: attention with a probability of 0 does not."""
    if not is_random(node.target):
        return False
    given = {**dict(zip(argument_names(node.target), node.args)), **node.kwargs}
    return bool(given.get("dropout_p", given.get("p", True)))


def _between(source: Varying, start: int, end: int) -> Over:
    """Over what columns ``start`` to ``end`` differ."""
    period, width = source.period, end - start
    first = start % period
    if width >= period or first + width > period:
        return source.over
    parts = [over for low, high, over in source.pieces if low < first + width and first < high]
    return SAME.union(*parts) if parts else SAME
