"""A role of a program as a torch module: the one place that knows how. Every export begins here.

Parameters and buffers are those of the module, under the names that they have in the model; the inputs of the graph
are those of ``forward``. A collective becomes what it needs of torch's functional collectives
(:mod:`autopar.exporters.functional`), by the name of its group, and local work around it. What a rank knows of its own
place (its position on an axis, the rows that it takes of a whole tensor) is a buffer of ``autopar_rank``: one trace
serves all ranks of the role, and only buffers differ (:func:`rank_tensors`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.communication.pieces import Crossing, crossing, grown
from autopar.errors import ExportError
from autopar.exporters import dynamic_cuts, functional
from autopar.exporters.dynamic_cuts import apart, has_symbols, refuse_symbols, together
from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.plain_gradients import GRADIENTS
from autopar.exporters.plain_operators import PLAIN
from autopar.ir import collectives as comm
from autopar.ir.layout import Split, owned_indices, shard
from autopar.ir.node import Node, value, values
from autopar.ir.program import AnyProgram, Program
from autopar.ir.sizes import is_expression
from autopar.ir.tables import Input, InputKind
from autopar.mesh import PIPELINE, Mesh

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)
OWN = "autopar_rank"  # the submodule of what a rank knows of its own place
CONSTANTS = "autopar_constants"  # that of tensors which the model made itself
TAKES = ("split", "split_replicated")
CUTS = (*TAKES, "pad")  # local: a part of a whole, or a whole around a part
OF_ONE_RANK = comm.targets(("shift", "start_shift", "reorder"))  # their exchange has other sizes on each rank

FORMS = {**PLAIN, **GRADIENTS}
Kind = tuple[torch.dtype, Sequence[int]]  # dtype and shape of a result on one rank
Forms = Mapping[Any, Callable[..., Any]]  # operator -> called with the kinds of its results, then with its arguments
Own = Callable[[Mapping[str, int]], Tensor]  # coordinates of a rank -> its own constant


@dataclass(frozen=True)
class Part:
    """What one rank of the whole mesh runs of a program: all of it, or one stage of a pipelined one."""

    whole: AnyProgram
    rank: int
    stage: int | None = None

    @property
    def program(self) -> Program:
        return self.whole.parts[self.stage or 0]

    @property
    def mesh(self) -> Mesh:
        """That of the program, or of the stage."""
        return self.program.mesh

    @property
    def coordinates(self) -> dict[str, int]:
        """Those on :attr:`mesh`."""
        return {
            axis: place for axis, place in self.whole.mesh.coordinates(self.rank).items() if axis in self.mesh.names
        }

    @property
    def name(self) -> str:
        """``rank3``, or ``rank3-stage1``."""
        return f"rank{self.rank}" + ("" if self.stage is None else f"-stage{self.stage}")

    @property
    def role(self) -> tuple[int, int]:
        """Equal for parts that run the same graph: the stage, and the rank where a graph is of one rank only."""
        graphs = self.program.required_role.graphs.values()
        alone = any(node.target in OF_ONE_RANK for graph in graphs for node in graph.nodes)
        return self.stage or 0, self.rank if alone else 0


def parts_of(program: AnyProgram, ranks: Sequence[int]) -> list[Part]:
    """What ``ranks`` run, in their order, stages in the order of the model."""
    if isinstance(program, Program):
        return [Part(program, rank) for rank in ranks]
    placement = program.required_schedule.placement
    place = {rank: program.mesh.coordinates(rank)[PIPELINE] for rank in ranks}
    return [Part(program, rank, stage) for rank in ranks for stage, at in enumerate(placement) if at == place[rank]]


def is_held(entry: Input) -> bool:
    """Whether it is state of the module, not an input of ``forward``."""
    return entry.kind in HELD


def tensor_name(entry: Input) -> str:
    """The name of a held tensor in the state of a rank module: that in the model, up to constants."""
    return f"{CONSTANTS}.{plain_name(entry.target)}" if entry.kind is InputKind.CONSTANT else entry.target


def plain_name(text: str) -> str:
    """``text`` with an underscore for all that may not stand in a name."""
    return re.sub(r"\W", "_", text)


class RankModule(nn.Module):
    """The graph of a role on one rank, with the collectives of torch inside.

    ``make``: gives a tensor of a shape and dtype, in which the state may be loaded later. ``runs``: ``inference``;
    ``step``, forward and backward, which returns the outputs, then the gradients of the loss (``role.grads``); or one
    of the two graphs as it is, ``forward``, which returns what it saves too, or ``backward``, which takes that and the
    gradients of outputs and has no state of the model. ``forms``: what stands for some operators in place of their
    plain forms. Raises ExportError for an operator that has none.
    """

    def __init__(
        self,
        part: Part,
        make: Callable[[Sequence[int], torch.dtype], Tensor],
        *,
        runs: str = "inference",
        forms: Forms | None = None,
        sizes: DynamicSizes | None = None,
    ) -> None:
        super().__init__()
        self._forms, self._sizes = forms or {}, sizes
        self._part, self._make, self._runs = part, make, runs
        self._graph = graph = self._first_graph
        self.own: dict[str, Own] = {}
        self._held: dict[Node, tuple[nn.Module, str]] = {}
        self._begins: dict[Node, tuple[Any, ...]] = {}  # constants that are the beginning of a longer one
        self.inputs: list[tuple[Node, Input]] = []
        self.add_module(OWN, nn.Module())
        self.takes = [node for node in graph.nodes if node.op == "placeholder"]  # what ``forward`` does, in the end
        entries = part.program.placeholders(*InputKind) if runs != "backward" else ()
        for node, (_, entry) in zip(list(self.takes) if runs != "backward" else (), entries, strict=True):
            if not is_held(entry):
                self.inputs.append((node, entry))
                continue
            self.takes.remove(node)
            path, _, key = tensor_name(entry).rpartition(".")
            owner, kind = _submodule(self, path), value(node)
            shape = kind.layout.local_shape(part.mesh)
            if any(map(is_expression, shape)):
                self._begins[node], shape = shape, longest(node, entry, part).shape
            tensor = make(shape, kind.dtype)
            if entry.kind is InputKind.PARAMETER:
                owner.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(key, tensor)
            self._held[node] = owner, key
        self._crossings: dict[Node, tuple[Crossing, Crossing]] = {}
        for node in itertools.chain(graph.nodes, self._backward.nodes if runs == "step" else ()):
            if node.target in comm.TARGETS:
                self._prepare(node)

    @property
    def _first_graph(self) -> fx.Graph:
        role = self._part.program.required_role
        if self._runs == "backward":
            assert role.backward is not None, "the program has no backward pass"
            return role.backward
        return role.inference if self._runs == "inference" else role.forward

    @property
    def _backward(self) -> fx.Graph:
        program, role = self._part.program, self._part.program.required_role
        if role.backward is None or program.loss not in role.differentiable:
            raise ExportError("the program has no backward pass of a loss, and so no training step; leave out training")
        return role.backward

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        known: dict[Node, Any] = dict(zip(self.takes, given, strict=True))
        if self._sizes is not None:
            self._sizes.bind([(value(node).layout.local_shape(self._part.mesh), x) for node, x in known.items()])
        known |= {node: getattr(owner, key) for node, (owner, key) in self._held.items()}
        for node, shape in self._begins.items():
            for dim, size in enumerate(shape):
                known[node] = known[node].narrow(dim, 0, self._number(size)) if is_expression(size) else known[node]
        results = self._run(self._graph, known)
        if self._runs != "step":
            return results
        count, program = len(self._part.program.outputs), self._part.program
        ones = [
            torch.full_like(results[position], float(position == program.loss))
            for position in program.required_role.differentiable
        ]
        nodes = [node for node in self._backward.nodes if node.op == "placeholder"]
        grads = self._run(self._backward, dict(zip(nodes, [*results[count:], *ones], strict=True)))
        return (*results[:count], *grads)

    def _run(self, graph: fx.Graph, known: dict[Node, Any]) -> tuple[Tensor, ...]:
        """The results of ``graph``, of whose placeholders ``known`` has the values."""
        for node in graph.nodes:
            if node.op == "output":
                return tuple(known[result] for result in node.args[0])
            if node.op == "call_function":
                known[node] = self._call(node, known)
        raise AssertionError("a graph ends with its output")

    def _call(self, node: Node, known: Mapping[Node, Any]) -> Any:
        target: Any = node.target
        name = comm.TARGETS.get(target)
        if name is not None:
            given = self._number(fx.map_arg(comm.arguments_of(node), known.__getitem__))
            return self._communicate(node, comm.STARTED.get(name, name), *given.values())
        args, kwargs = self._number(fx.map_arg((node.args, node.kwargs), known.__getitem__))
        if target in self._forms:
            kinds = [(kind.dtype, self._number(kind.layout.local_shape(self._part.mesh))) for kind in values(node)]
            return self._forms[target](kinds, *args, **kwargs)
        target = FORMS.get(target, target)
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "autopar":
            raise ExportError(
                f"{node.name} is {target}, an operator of autopar that has no form in plain torch\n"
                "Way out: export the inference program; training programs of this model cannot be exported."
            )
        return target(*args, **kwargs)

    def _number(self, item: Any) -> Any:
        """``item`` with numbers in the places of expressions of sizes."""
        return item if self._sizes is None else self._sizes.number(item)

    # ------------------------------------------------------------ what a rank knows of its place

    def _prepare(self, node: Node) -> None:
        """Make the rank's own constants that a collective needs: data, which a trace of shapes does not have."""
        name, mesh = comm.TARGETS[node.target], self._part.mesh  # type: ignore[index]
        _, axis, *rest = comm.arguments_of(node).values() if name != "axis_index" else (None, node.args[0])
        changes = name in CUTS and any(map(is_expression, pytree.tree_leaves(rest)))  # with the sizes of a batch
        if name == "axis_index" or changes or (name == "keep_first" and mesh.size(str(axis)) > 1):
            self._add(f"position_{plain_name(str(axis))}", lambda here: torch.tensor(mesh.position(str(axis), here)))
        elif name in CUTS:
            self._add(_name_of(name, axis, rest), partial(_rows if name in TAKES else _places, mesh, str(axis), rest))
        elif name == "reorder":
            ends = [comm.end_of(end) for end in rest[1:]]
            length = value(node).shape[ends[0].dim]
            length = length if self._sizes is None else self._sizes.example(length)
            place, ways = mesh.position(str(axis), self._part.coordinates), mesh.size(str(axis))
            self._crossings[node] = crossing(*ends, length, place, ways), crossing(*ends[::-1], length, place, ways)

    def _add(self, name: str, own: Own) -> None:
        if name not in self.own:
            self.own[name] = own
            like = own(self._part.coordinates)
            self.get_submodule(OWN).register_buffer(name, self._make(like.shape, like.dtype))

    def _own(self, name: str) -> Tensor:
        return self.get_submodule(OWN).get_buffer(name)

    # ------------------------------------------------------------ collectives

    def _communicate(self, node: Node, name: str, *given: Any) -> Any:
        if name == "axis_index":
            return self._own(f"position_{plain_name(given[0])}")
        x, axis, *rest = given
        row, ways = comm.COLLECTIVES.get(name), self._part.mesh.size(axis)
        if row is None or row.does_nothing or name == "tally":  # a wait, too: what it waits for is done at once
            return x
        if name in CUTS:
            return self._cut(name, x, axis, rest)
        if ways == 1 or comm.is_idle(node, self._part.mesh):
            return x
        if name == "keep_first":
            return torch.where(self._own(f"position_{plain_name(axis)}") == 0, x, torch.zeros_like(x))
        if name == "all_reduce":
            return functional.all_reduce(x, rest[0], axis)
        if row.form is comm.SIZES:
            return functional.exchange(x, rest[2], rest[1], axis)
        if row.form is comm.PART:
            refuse_symbols(node.name, rest[3])
            return self._resize(name, x, axis, comm.split_of((axis, *rest)), rest[-1])
        return self._exchange(node, name, x, axis, rest)

    def _cut(self, name: str, x: Tensor, axis: str, rest: Sequence[Any]) -> Tensor:
        """This rank's part of a whole, padded with zeros; or a whole of zeros around this rank's part."""
        if has_symbols(rest):
            cut = dynamic_cuts.taken if name in TAKES else dynamic_cuts.put
            return cut(x, self._own(f"position_{plain_name(axis)}"), *rest)
        split, ways, length = comm.split_of((axis, *rest)), self._part.mesh.size(axis), rest[-1]
        if name in TAKES:
            size = -(-length // ways) * ways if split.contiguous else length
        else:
            size = x.shape[split.dim] + 1  # the zero that stands where the part does not
        return grown(x, split.dim, size).index_select(split.dim, self._own(_name_of(name, axis, rest)))

    def _resize(self, name: str, x: Tensor, axis: str, split: Split, length: int) -> Tensor:
        """The collectives between a part and a whole."""
        ways = self._part.mesh.size(axis)
        plain = split.contiguous and length % ways == 0
        if name == "reduce_scatter":
            if plain:
                return functional.reduce_scatter(x, split.dim, ways, axis)
            pieces = apart(x, split, ways)
            return functional.reduce_scatter(pieces.flatten(0, 1), 0, ways, axis).view(pieces.shape[1:])
        if plain:
            return functional.all_gather(x, split.dim, ways, axis)
        gathered = functional.all_gather(x, 0, ways, axis)
        return together(gathered.view(ways, *x.shape), split, length)

    def _exchange(self, node: Node, name: str, x: Tensor, axis: str, rest: Sequence[Any]) -> Tensor:
        ways = self._part.mesh.size(axis)
        if name == "shift":
            place, by = self._part.mesh.position(axis, self._part.coordinates), rest[1]
            sent, received = ([int((place + step - other) % ways == 0) for other in range(ways)] for step in (by, -by))
            return functional.all_to_all(x.unsqueeze(0), received, sent, axis).squeeze(0)
        if name == "all_to_all":
            before, after = (comm.end_of(end) for end in rest[1:])
            pieces = apart(x, after, ways)
            equal = [pieces.shape[1]] * ways
            got = functional.all_to_all(pieces.flatten(0, 1), equal, equal, axis)
            return together(got.view(pieces.shape), before, pieces.shape[1 + before.dim] * ways)
        there, back = self._crossings[node]
        dim = comm.end_of(rest[1]).dim
        size = x.shape[dim] // len(there.order)  # there.size, or that at another length
        blocks = torch.stack([x.narrow(dim, block * size, size) for block in there.order])
        got = functional.all_to_all(blocks, list(back.counts), list(there.counts), axis)
        return torch.cat([got[back.order.index(block)] for block in range(len(back.order))], dim)


def longest(node: Node, entry: Input, part: Part) -> Tensor:
    """A constant that has other sizes in other members of a family, of which each has the beginning.

    Raises ExportError where the ranks have parts of it.
    """
    whole = part.program.constants.get(entry.target)
    if whole is None or value(node).layout.axes:
        raise ExportError(
            f"'{entry.target}', {value(node).layout}, has other sizes in each batch, and each rank a part of it\n"
            "Way out: export a program of fixed sizes (compile_program) for this mesh."
        )
    return whole


def _rows(mesh: Mesh, axis: str, rest: Sequence[Any], here: Mapping[str, int]) -> Tensor:
    """The elements of a whole dim that the rank takes; behind the end where its part is padded."""
    split, ways, position, length = comm.split_of((axis, *rest)), mesh.size(axis), mesh.position(axis, here), rest[-1]
    if split.contiguous:
        size = -(-length // ways)
        return torch.arange(position * size, (position + 1) * size)
    return owned_indices(length, split, position, ways)


def _places(mesh: Mesh, axis: str, rest: Sequence[Any], here: Mapping[str, int]) -> Tensor:
    """For each element of a whole dim its place in the rank's part; the one after that where it is not there."""
    split, ways, length = comm.split_of((axis, *rest)), mesh.size(axis), rest[-1]
    owned = owned_indices(length, split, mesh.position(axis, here), ways)
    return torch.full((length,), -(-length // ways)).index_copy_(0, owned, torch.arange(len(owned)))


def _name_of(name: str, axis: Any, rest: Sequence[Any]) -> str:
    return plain_name(f"{'put' if name == 'pad' else 'take'}_{axis}_{'_'.join(map(str, rest))}")


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


# ---------------------------------------------------------------- the tensors of a rank


def part_of(whole: Tensor, node: Node, part: Part) -> Tensor:
    """What the rank holds of a whole tensor; a short part is padded with zeros."""
    layout = value(node).layout
    if not layout.axes:
        return whole
    piece = shard(whole, layout, part.mesh, part.coordinates)
    for dim, size in enumerate(layout.local_shape(part.mesh)):
        piece = grown(piece, dim, size)
    return piece


def rank_tensors(part: Part, own: Mapping[str, Own]) -> dict[str, Tensor]:
    """What the rank knows of its place, by the names in the state of the module that has these constants."""
    return {f"{OWN}.{name}": made(part.coordinates) for name, made in own.items()}


def constants_of(part: Part) -> dict[str, Tensor]:
    """The rank's part of the program's constants, by their names in the state."""
    return {
        tensor_name(entry): part_of(part.program.constants[entry.target], node, part)
        for node, entry in part.program.placeholders(InputKind.CONSTANT)
    }
