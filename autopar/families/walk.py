"""A walk over the numbers of a program in a fixed order: to read them, or to put others in their places.

Two programs of one model for batches of different lengths usually differ in these numbers alone: what is left of both,
their skeletons, is then equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from autopar.families.ratios import has_ratio, ratio_of, segments, with_ratios, with_segments
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import Node, Value, origin, set_origin, set_values, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.sizes import is_expression
from autopar.ir.tables import Role
from autopar.mesh import Mesh

Number = Any  # int, float, or an expression of sizes
Put = Callable[[Number], Number]  # a number -> what stands in its place


def numbers_of(program: AnyProgram) -> tuple[list[Number], list[Any]]:
    """The numbers of ``program``, and its skeleton: all else that is compared between members of a family."""
    found: list[Number] = []

    def read(number: Number) -> Number:
        found.append(number)
        return number

    skeleton: list[Any] = []
    Walk(read, skeleton.append, remembers=False).program(program)
    return found, skeleton


def in_order(program: AnyProgram, numbers: Iterable[Number]) -> AnyProgram:
    """``program`` with others in the places of its numbers, in the order of :func:`numbers_of`."""
    following = iter(numbers)
    return Walk(lambda _: next(following), remembers=False).program(program)


def evaluated(program: AnyProgram, put: Put, constants: Callable[[str, Tensor], Tensor]) -> AnyProgram:
    """``program`` with ``put`` of each number in its place, and ``constants`` of each constant (place, tensor).

    Equal numbers have equal ones in their places.
    """
    return Walk(put, constants=constants, is_lazy=True).program(program)


def unequal_segments(program: AnyProgram) -> list[tuple[Number, ...]]:
    """The sizes of segments in a template that are expressions. Where they are all equal, a layout is another one."""
    walk = Walk(lambda number: number)
    walk.program(program)
    return list(walk.ratios)


def evaluated_graph(graph: fx.Graph, numbers: Mapping[Any, Number]) -> fx.Graph:
    """``graph`` with ``numbers`` in the places of expressions."""
    return Walk(lambda number: numbers[number] if is_expression(number) else number).graph(graph)


@dataclass
class Walk:
    """One walk.

    Attributes:
        put: a number -> what stands in its place.
        note: takes what else there is, in order.
        constants: (place in the program and name, tensor) -> the tensor in its place.
        remembers: whether equal types may be put once: ``put`` is a function of the number.
        is_lazy: whether graphs are walked over when somebody asks for them.
        ratios: the sizes of unequal segments that were come across, of which some are expressions.
    """

    put: Put
    note: Callable[[Any], None] | None = None
    constants: Callable[[str, Tensor], Tensor] | None = None
    remembers: bool = True
    is_lazy: bool = False
    _types: dict[Value, Value] = field(default_factory=dict)
    ratios: dict[tuple[Number, ...], None] = field(default_factory=dict)

    def program(self, program: AnyProgram, place: str = "") -> AnyProgram:
        """``program`` around new graphs; what is not walked over (decisions, pins, the plan) stays."""
        self._note(program.mesh, program.inputs, program.outputs, program.passes, program.in_spec, program.out_spec)
        self._note(tuple(program.joins.items()))
        if self.is_lazy and isinstance(program, Program):
            return LazyProgram.of(program, self, place)
        common = {**self.tables(program, place), "graph": self.graph(program.graph, program.mesh)}
        common |= {"source": self.inner(program.source, f"{place}source.")}
        common |= {"counts": self.inner(program.counts, f"{place}counts.")}
        if isinstance(program, Program):
            role = None if program.role is None else self.role(program.role, program.mesh)
            return replace(program, **common, role=role)
        return self._pipelined(program, common, place)

    def tables(self, program: AnyProgram, place: str) -> dict[str, Any]:
        """What has numbers in a program beside its graphs."""
        return {
            "static_inputs": self.item(program.static_inputs, {}),
            "static_outputs": self.item(program.static_outputs, {}),
            "constants": self._tensors(program.constants, place),
        }

    def inner(self, program: Program | None, place: str) -> Program | None:
        """A program in another one."""
        return None if program is None else self.program(program, place)  # type: ignore[return-value]

    def _pipelined(self, program: PipelinedProgram, common: dict[str, Any], place: str) -> PipelinedProgram:
        self._note(program.schedule, len(program.stages), program.tail is None)
        stages = tuple(self.program(stage, f"{place}{n}.") for n, stage in enumerate(program.stages))
        tail = None if program.tail is None else self.program(program.tail, f"{place}tail.")
        return replace(program, **common, stages=stages, tail=tail)  # type: ignore[arg-type]

    def role(self, role: Role, mesh: Mesh | None = None) -> Role:
        self._note(role.saved, role.differentiable, role.grads, role.backward is None)
        backward = None if role.backward is None else self.graph(role.backward, mesh)
        forward, inference = self.graph(role.forward, mesh), self.graph(role.inference, mesh)
        return replace(role, forward=forward, backward=backward, inference=inference)

    def graph(self, graph: fx.Graph, mesh: Mesh | None = None) -> fx.Graph:
        """``mesh`` is needed where numbers are read; an expression is put in its place without."""
        new, copies = fx.Graph(), dict[Node, Node]()
        for node in graph.nodes:
            self._note(node.op, node.name, node.target)
            args, kwargs = self._arguments(node, copies, mesh), self.item(node.kwargs, copies)
            made = copies[node] = new.create_node(node.op, node.target, args, kwargs, node.name)
            set_values(made, *map(self._type, values(node)))
            set_origin(made, origin(node))
        return new

    def _arguments(self, node: Node, copies: Mapping[Node, Node], mesh: Mesh | None) -> Any:
        if not has_ratio(node):
            return self.item(node.args, copies)
        return with_ratios(self.item(with_segments(node, mesh), copies))

    def item(self, item: Any, copies: Mapping[Node, Node]) -> Any:
        """An argument of a node: numbers in lists, tuples, dicts and slices."""
        kind = type(item)
        if kind is int or kind is float or is_expression(item):
            return self.put(item)
        if isinstance(item, Node):
            self._note(item.name)
            return copies[item]
        if isinstance(item, (tuple, list)):
            self._note(kind, len(item))
            return kind([self.item(each, copies) for each in item])  # type: ignore[call-arg]
        if isinstance(item, dict):
            self._note(kind, *item)
            return {key: self.item(each, copies) for key, each in item.items()}
        if isinstance(item, slice):
            return slice(*(self.item(each, copies) for each in (item.start, item.stop, item.step)))
        self._note(item)
        return item

    def _type(self, kind: Value) -> Value:
        if self.remembers and kind in self._types:
            return self._types[kind]
        layout = kind.layout
        self._note(kind.dtype, kind.requires_grad, layout.partial)
        dims = tuple([tuple([self._factor(factor) for factor in dim]) for dim in layout.dims])
        found = self._types[kind] = Value(kind.dtype, Layout(dims, layout.partial), kind.requires_grad)
        return found

    def _factor(self, factor: Factor) -> Factor:
        parts = segments(factor.ratio, factor.size)
        self._note(factor.axes, len(parts), factor.mirrored, factor.ragged, factor.order)
        if len(parts) == 1:
            return replace(factor, size=self.put(factor.size))
        if any(map(is_expression, parts)):
            self.ratios[parts] = None
        ratio = ratio_of([self.put(part) for part in parts])
        return replace(factor, size=self.put(factor.size), ratio=ratio)

    def _tensors(self, constants: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        for name, tensor in constants.items():
            self._note(name, tensor.dtype, tensor.dim())
        if self.constants is None:
            return dict(constants)
        return {name: self.constants(place + name, tensor) for name, tensor in constants.items()}

    def _note(self, *things: Any) -> None:
        if self.note is not None:
            for thing in things:
                self.note(thing)


class LazyProgram(Program):
    """A program whose graphs are made from those of a template at first use: a step needs few of them."""

    _template: Program
    _walk: Walk
    _place: str

    @classmethod
    def of(cls, template: Program, walk: Walk, place: str) -> LazyProgram:
        made = object.__new__(cls)
        known = {name: item for name, item in vars(template).items() if name not in LAZY}
        made.__dict__.update(known, **walk.tables(template, place), _template=template, _walk=walk, _place=place)
        return made

    @cached_property
    def graph(self) -> fx.Graph:  # type: ignore[override]
        return self._walk.graph(self._template.graph)

    @cached_property
    def role(self) -> Role | None:  # type: ignore[override]
        role = self._template.role
        return None if role is None else self._walk.role(role)

    @cached_property
    def source(self) -> Program | None:  # type: ignore[override]
        return self._walk.inner(self._template.source, f"{self._place}source.")

    @cached_property
    def counts(self) -> Program | None:  # type: ignore[override]
        return self._walk.inner(self._template.counts, f"{self._place}counts.")


LAZY = ("graph", "role", "source", "counts")


def constants_of(program: AnyProgram) -> dict[str, Tensor]:
    """The constants of ``program`` and of the programs in it, by their places."""
    found: dict[str, Tensor] = {}

    def read(place: str, tensor: Tensor) -> Tensor:
        found[place] = tensor
        return tensor

    Walk(lambda number: number, constants=read).program(program)
    return found
