"""A program as bytes and back, whole and fast: that of a 70B in a third of a second, a tenth of the time of its text.

The graphs of a program are bytes apart, which are read where somebody looks into one of them
(:mod:`autopar.ir.stored_graph`).

The bytes are a pickle of the program's own classes and of nothing else: what a reader may find by name is listed here,
so that bytes of somebody else cannot run anything. Tensors, operators, structures and plans are written as data. Nodes
come in the order of their graph, so that arguments refer to nodes which are there already.
"""

from __future__ import annotations

import io
import json
import operator
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from autopar.cache.code_digests import digest, digest_of_bytes
from autopar.cache.folder import joined_parts, split_parts
from autopar.cache.reasons import Unstorable
from autopar.families.forms import form_of, terms_of
from autopar.ir import fingerprint, layout, tables
from autopar.ir.collection import no_collection
from autopar.ir.node import Origin, Value, origin, set_origin, set_values, values
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.read_graph import operator_named
from autopar.ir.stored_graph import Border, Port, Shelf, StoredGraph, border_of
from autopar.ir.text import operator_name
from autopar.ir.value_guards import Look
from autopar.mesh import Digit, Mesh
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.program_files.structures import structure_from_json, structure_to_json
from autopar.schedules import instructions

QUICKLY = 1  # of zlib's levels

_CLASSES = (
    Program, PipelinedProgram, Mesh, Digit, Precision, Value, Origin, Look, fingerprint.Fingerprint,
    fingerprint.CallFacts, layout.Layout, layout.Factor, layout.Whole, layout.Split, layout.Partial, tables.Input,
    tables.InputKind, tables.Output, tables.OutputKind, tables.Decision, tables.Routed, tables.Unrouted, tables.Role,
    instructions.Kind, instructions.Compute, instructions.Message, instructions.Send, instructions.Receive,
    instructions.Link, instructions.Schedule, OrderedDict, immutable_list, immutable_dict, torch.Size, torch.device,
    set, frozenset, slice, range, complex, Border, Port,
)  # fmt: skip


# ---------------------------------------------------------------- what stands for other things


def _graph() -> fx.Graph:
    return fx.Graph()


def _filled(graph: fx.Graph, content: tuple[list[fx.Node], dict[int, list[int]]]) -> None:
    """A graph has its nodes as soon as they are made, in the order of the list; what is left are orders of users."""
    nodes, users = content
    for place, order in users.items():
        mine = nodes[place].users
        mine.clear()
        mine.update(dict.fromkeys(nodes[other] for other in order))


def _node(
    graph: fx.Graph, op: str, target: Any, args: Any, kwargs: Any, name: str, types: Any, where: Origin
) -> fx.Node:
    made = graph.create_node(op, target, args, kwargs, name)
    if types:
        set_values(made, *types)
    if types or where != _NOWHERE:
        set_origin(made, where)
    return made


_NOWHERE = Origin()


@cache
def _operator(name: str) -> Any:
    return operator.getitem if name == "getitem" else operator_named(name)


def _named_by_torch(name: str) -> Any:
    return getattr(torch, name)


def _tensor(dtype: torch.dtype, span: int, shape: tuple[int, ...], stride: tuple[int, ...], data: bytes) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(span, dtype=dtype)
    return flat.as_strided(shape, stride)


def _structure(text: str) -> pytree.TreeSpec | None:
    found, unknown = structure_from_json(json.loads(text))
    if unknown:
        raise Unstorable(f"its inputs or outputs are of the class {unknown[0]}, which is not known here")
    return found


def _mapping(items: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(items)


def _pins(layouts: Any, dtypes: Any, stages: Any, homes: Any) -> tables.Pins:
    return tables.Pins(layouts, dtypes, stages, homes)


@cache
def _expression(terms: str) -> Any:
    found = json.loads(terms)
    return form_of(found, sorted({size for _, _, *sizes in found[1:] for size in sizes}))


def may_be_packed(*classes: type) -> None:
    """Let programs be packed together with plain values of ``classes``."""
    _FOUND.update({(cls.__module__, cls.__qualname__): cls for cls in classes})


def _like_plan(changed: dict[str, Any]) -> Plan:
    """The plan of the reader with some other choices: only :class:`_Reader` knows it."""
    raise TypeError("read by a _Reader alone")


def _stored_graph(number: int, border: Border) -> fx.Graph:
    """A graph that is on the reader's shelf: only :class:`_Reader` knows it."""
    raise TypeError("read by a _Reader alone")


_MAKERS: tuple[Callable[..., Any], ...] = (
    _graph, _filled, _node, _operator, _named_by_torch, _tensor, _structure, _mapping, _pins, _like_plan, _stored_graph,
    _expression,
)  # fmt: skip
_ALL: tuple[Any, ...] = (*_CLASSES, *_MAKERS)
_FOUND = {(each.__module__, each.__qualname__): each for each in _ALL}


# ---------------------------------------------------------------- writing


class _Writer(pickle.Pickler):
    """``plan``: that of the program, which the reader has too. ``apart``: gets the graphs, which are left out."""

    def __init__(self, stream: io.BytesIO, plan: Plan, apart: list[fx.Graph] | None = None) -> None:
        super().__init__(stream, protocol=5)
        self._plan, self._apart = plan, apart
        self._graphs: set[int] = set()
        self.operators: dict[str, None] = {}
        self._equal: dict[Any, Any] = {}  # equal types and origins are written once

    def reducer_override(self, thing: Any) -> Any:
        made = _WRITTEN.get(type(thing))
        if made is not None:
            return made(self, thing)
        if isinstance(thing, sympy.Expr):
            return self._expression(thing)
        if isinstance(thing, torch._ops.OpOverload) or (callable(thing) and not isinstance(thing, type)):
            return self._operator(thing)
        if isinstance(thing, Tensor):
            return self._tensor(thing)
        cls: Any = thing if isinstance(thing, type) else type(thing)
        if (cls.__module__, cls.__qualname__) not in _FOUND:
            raise Unstorable(f"it has a {cls.__module__}.{cls.__qualname__}")
        return NotImplemented

    def _once(self, thing: Any) -> Any:
        return self._equal.setdefault(thing, thing)

    def _graph(self, graph: fx.Graph) -> Any:
        if self._apart is not None:
            self._apart.append(graph)
            return _stored_graph, (len(self._apart) - 1, self._border(graph))
        self._graphs.add(id(graph))
        nodes = list(graph.nodes)
        place = {node: number for number, node in enumerate(nodes)}
        users = {number: [place[user] for user in node.users] for number, node in enumerate(nodes)}
        unusual = {number: order for number, order in users.items() if order != sorted(order)}
        return _graph, (), (nodes, unusual), None, None, _filled

    def _border(self, graph: fx.Graph) -> Border:
        found = border_of(graph)
        takes = tuple([Port(port.name, self._once(port.types), port.is_used) for port in found.takes])
        return Border(takes, tuple(map(self._once, found.returns)))

    def _node(self, node: fx.Node) -> Any:
        if id(node.graph) not in self._graphs:
            raise Unstorable(f"the node '{node.name}' belongs to no graph of it")
        types, where = self._once(values(node)), self._once(origin(node))
        return _node, (node.graph, node.op, node.target, node.args, node.kwargs, node.name, types, where)

    def _operator(self, target: Any) -> Any:
        if target in _MAKERS:
            return NotImplemented
        name = "getitem" if target is operator.getitem else operator_name(target)
        if name.startswith(("python.", "higher_order.")):
            raise Unstorable(f"it calls {name}, which has no name that another process could find")
        self.operators[name] = None
        return _operator, (name,)

    def _expression(self, form: Any) -> Any:
        terms = json.dumps(terms_of(form))
        if _expression(terms) != form:
            raise Unstorable(f"the expression {form} does not read back")
        return _expression, (terms,)

    def _by_name(self, thing: Any) -> Any:
        return _named_by_torch, (str(thing).removeprefix("torch."),)

    def _tensor(self, tensor: Tensor) -> Any:
        plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg() or tensor.requires_grad:
            raise Unstorable(f"it has a constant that is no plain tensor on the CPU ({type(tensor).__name__})")
        stride = tuple(tensor.stride())
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride)) if tensor.numel() else 0
        flat = tensor.detach().as_strided((span,), (1,))
        data = bytes(flat.view(torch.uint8).numpy().data) if span else b""
        return _tensor, (tensor.dtype, span, tuple(tensor.shape), stride, data)

    def _structure(self, spec: pytree.TreeSpec) -> Any:
        try:
            text = json.dumps(structure_to_json(spec))
        except ValueError as error:
            raise Unstorable(str(error)) from error
        if _structure(text) != spec:
            raise Unstorable("the structure of its inputs or outputs does not read back")
        return _structure, (text,)

    def _of_plan(self, plan: Plan) -> Any:
        own = {entry.name: getattr(plan, entry.name) for entry in fields(Plan)}
        changed = {name: value for name, value in own.items() if value != getattr(self._plan, name)}
        return _like_plan, (changed,)

    def _of_mapping(self, mapping: Mapping[Any, Any]) -> Any:
        return _mapping, (dict(mapping),)

    def _of_pins(self, pins: tables.Pins) -> Any:
        return _pins, (pins.layouts, pins.dtypes, pins.stages, pins.homes)  # of_rows is for the passes


_WRITTEN: dict[type, Callable[[_Writer, Any], Any]] = {
    fx.Graph: _Writer._graph,
    StoredGraph: _Writer._graph,
    fx.Node: _Writer._node,
    torch.dtype: _Writer._by_name,
    torch.memory_format: _Writer._by_name,
    torch.layout: _Writer._by_name,
    Plan: _Writer._of_plan,
    tables.Pins: _Writer._of_pins,
    MappingProxyType: _Writer._of_mapping,
    pytree.TreeSpec: _Writer._structure,
    pytree.LeafSpec: _Writer._structure,
}


def packed(thing: Any, plan: Plan) -> bytes:
    """``thing``, a program or a part of one, as bytes. Raises Unstorable with the reason where it has no such form."""
    return _dumped(thing, plan)[0]


def _dumped(thing: Any, plan: Plan, apart: list[fx.Graph] | None = None) -> tuple[bytes, list[str]]:
    """With the names of the operators that are in it."""
    stream = io.BytesIO()
    with no_collection():
        writer = _Writer(stream, plan, apart)
        writer.dump(thing)
    return zlib.compress(stream.getvalue(), QUICKLY), list(writer.operators)


def packed_apart(thing: Any, plan: Plan) -> tuple[bytes, bytes, list[fx.Graph]]:
    """As :func:`packed`, with the graphs in ``thing`` as bytes of their own, and these graphs in their order.

    Raises Unstorable.
    """
    graphs: list[fx.Graph] = []
    outside, _ = _dumped(thing, plan, graphs)
    nodes, operators = _dumped(graphs, plan)
    return joined_parts([outside, json.dumps(operators).encode()]), nodes, graphs


# ---------------------------------------------------------------- reading


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, plan: Plan, shelf: Shelf | None = None) -> None:
        super().__init__(stream)
        self._plan, self._shelf = plan, shelf

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_like_plan.__module__, _like_plan.__qualname__):
            return self._like_plan
        if (module, name) == (_stored_graph.__module__, _stored_graph.__qualname__) and self._shelf is not None:
            return self._shelf.put
        found = _FOUND.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a program")
        return found

    def _like_plan(self, changed: dict[str, Any]) -> Plan:
        return replace(self._plan, **changed) if changed else self._plan


def unpacked(content: bytes, plan: Plan) -> Any:
    """The inverse of :func:`packed`. Raises any exception for bytes that are damaged; they have a checksum for that."""
    return _loaded(content, plan)


def _loaded(content: bytes, plan: Plan, shelf: Shelf | None = None) -> Any:
    with no_collection():
        return _Reader(io.BytesIO(zlib.decompress(content)), plan, shelf).load()


def unpacked_apart(content: bytes, nodes: bytes, plan: Plan, text: str, code: bytes | None) -> Any:
    """The inverse of :func:`packed_apart`, with graphs that are read later; ``text``, ``code``: of their shelf.

    Raises any exception where they could not be read later.
    """
    outside, operators = split_parts(content)
    for name in json.loads(operators):
        _operator(name)
    read, whole = partial(unpacked, nodes, plan), partial(_digest, content, nodes)
    shelf = Shelf(text, code, read, partial(_unpacked_graphs, plan=plan), whole)
    return _loaded(outside, plan, shelf)


def _digest(*parts: bytes) -> str:
    return digest(*map(digest_of_bytes, parts))


def packed_graphs(graphs: list[fx.Graph], plan: Plan) -> bytes:
    """Graphs that are no part of a program, for a shelf's ``others``. Raises Unstorable."""
    outside, nodes, _ = packed_apart(graphs, plan)
    return joined_parts([outside, nodes])


def _unpacked_graphs(content: bytes, plan: Plan) -> Any:
    outside, nodes = split_parts(content)
    return unpacked_apart(outside, nodes, plan, "", None)
