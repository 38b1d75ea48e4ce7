"""The stretches of a rank graph between collectives, each as a pure function of tensors that a compiler may take.

    mul = aten.mul(x, w); add = aten.add(mul, b); all_reduce = comm.all_reduce(add, tp)
    -->
    given = [x, w, b]; del x
    add, = region_5f2c0a91d3(comm, given)      # def region_5f2c0a91d3(comm, inputs): ...
    all_reduce = comm.all_reduce(add, "tp", "sum"); del add

A region is a run of lines of the graph, so everything stays in the order of the text; it ends at collectives, at lines
that the compiler cannot take, and where a repeated block of the model does. Regions that do the same with tensors of
the same sizes are one function: n equal blocks have the regions of one.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import Node, origin, set_origin, set_values, values
from autopar.ir.operator_facts import bare_name, facts_of, is_overload, is_random, is_view, only_moves, writes
from autopar.ir.sizes import is_expression
from autopar.mesh import Mesh
from autopar.operators.random import random_keep, random_uniform

FEWEST = 2  # computing lines, products aside, for which a call of compiled code pays
_UNFIT_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
_RANDOM = {random_keep, random_uniform}
WHOLE = {torch.int64, torch.int32}
_LARGE = 2**31  # a product with such a whole number wraps around in int64, which C++ does not promise


@dataclass(frozen=True)
class Region:
    """The target of a node that stands for a run of lines: ``node.args[0]`` are its operands, items its results.

    ``key``: all that it does, as text; regions with equal ones are one function. ``graph``: (operands) -> results.
    ``symbols``: in a family of programs, the sizes of a batch on which it depends.
    """

    key: str
    graph: fx.Graph = field(compare=False, repr=False)
    symbols: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    @property
    def __name__(self) -> str:
        return f"region_{hashlib.sha256(self.key.encode()).hexdigest()[:10]}"

    def __call__(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        raise NotImplementedError("a region runs in the Python that is written of its graph")


def with_regions(graph: fx.Graph, mesh: Mesh, takes: Callable[[Any], bool]) -> fx.Graph:
    """A copy of ``graph`` with a node for each region. ``takes``: whether the compiler knows an operator."""
    found = fx.Graph()
    copies: dict[Node, Node] = {}
    for run in _runs(graph, takes):
        computing, rest = _without_last_moves(run)
        if _pays(computing):
            _put(found, copies, computing, mesh)
        else:
            rest = run
        for node in rest:
            copies[node] = found.node_copy(node, copies.__getitem__)
    return found


def regions_of(graph: fx.Graph) -> list[Region]:
    """Those of a graph of :func:`with_regions`, each once, in order."""
    return list(dict.fromkeys(node.target for node in graph.nodes if isinstance(node.target, Region)))


# ---------------------------------------------------------------- where regions begin and end


def _runs(graph: fx.Graph, takes: Callable[[Any], bool]) -> Iterator[list[Node]]:
    """The nodes in order, in runs that fit into a region each; one that fits into none is a run by itself."""
    run: list[Node] = []
    fitting: set[Node] = set()
    wrapping: set[Node] = set()
    block = ""
    for node in _with_items_at_once(graph):
        if _wraps(node, wrapping):
            wrapping.add(node)
        if node in wrapping or not _fits(node, fitting, takes):
            yield from filter(None, (run, [node]))
            run = []
            continue
        here = block_of(node) if origin(node).module else block
        if run and here != block and (is_repeated(here) or is_repeated(block)):
            yield run
            run = []
        block = here
        fitting.add(node)
        run.append(node)
    yield from filter(None, (run,))


def _with_items_at_once(graph: fx.Graph) -> Iterator[Node]:
    """The nodes, each item of a tuple right after the tuple: a region returns no tuples."""
    for node in graph.nodes:
        if node.target is operator.getitem:
            continue
        yield node
        yield from (user for user in node.users if user.target is operator.getitem)


def _fits(node: Node, fitting: set[Node], takes: Callable[[Any], bool]) -> bool:
    """Whether ``node`` is a pure function of tensors whose sizes are known."""
    if node.op != "call_function" or not values(node):
        return False
    if node.target is operator.getitem:
        return node.all_input_nodes[0] in fitting
    items = sum(user.target is operator.getitem for user in node.users)
    if items and items < len(node.users) or len(values(node)) > 1 and not items:
        return False  # a tuple that is used as one
    if any(len(values(source)) != 1 for source in node.all_input_nodes):
        return False  # of a number, or of a tuple that is no tensor's
    if any(kind.layout.ragged for each in (node, *node.all_input_nodes) for kind in values(each)):
        return False
    return _is_pure(node.target) and takes(node.target)


def _wraps(node: Node, wrapping: set[Node]) -> bool:
    """Whether ``node`` is whole numbers of a generator of random ones, which wrap around, or is made of such."""
    if node.op != "call_function" or not values(node) or any(kind.dtype not in WHOLE for kind in values(node)):
        return False
    given = (*node.args, *node.kwargs.values())
    large = any(isinstance(each, int) and abs(each) >= _LARGE for each in given)
    return large or not wrapping.isdisjoint(node.all_input_nodes)


def _is_pure(target: Any) -> bool:
    if target in comm.TARGETS or target in _RANDOM or writes(target) or is_random(target):
        return False
    return not (is_overload(target) and _UNFIT_TAGS & set(target.tags))


def _pays(run: Sequence[Node]) -> bool:
    computing = [node for node in run if node.op == "call_function" and node.target is not operator.getitem]
    return sum(not is_view(node.target) and not facts_of(node.target).product for node in computing) >= FEWEST


def _without_last_moves(run: Sequence[Node]) -> tuple[Sequence[Node], Sequence[Node]]:
    """The lines up to the last that computes, and those after it.

    They put gradients into a bucket, or arrange what a collective takes: with them the last block would be unlike the
    others.
    """
    end = len(run)
    while end and only_moves(run[end - 1].target):
        end -= 1
    return run[:end], run[end:]


# ---------------------------------------------------------------- the graph of a region


def _put(graph: fx.Graph, copies: dict[Node, Node], run: Sequence[Node], mesh: Mesh) -> None:
    """Add a call of the region of ``run`` to ``graph``, and its results."""
    inside = set(run)
    operands = list(dict.fromkeys(source for node in run for source in node.all_input_nodes if source not in inside))
    results = [node for node in run if any(user not in inside for user in node.users)]
    if not results:
        return
    call = graph.call_function(_region(run, operands, results, mesh), ([copies[node] for node in operands],))
    set_origin(call, origin(run[0]))
    for position, node in enumerate(results):
        item = graph.create_node("call_function", operator.getitem, (call, position), name=node.name)
        set_values(item, *values(node))
        set_origin(item, origin(node))
        copies[node] = item


def _region(run: Sequence[Node], operands: Sequence[Node], results: Sequence[Node], mesh: Mesh) -> Region:
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    lines: list[str] = []
    for position, node in enumerate(operands):
        copies[node] = graph.placeholder(f"x{position}")
        set_values(copies[node], *values(node))
        (kind,) = values(node)
        lines.append(f"{kind.dtype} {kind.layout.local_shape(mesh)}")
    for node in run:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)  # type: ignore[no-untyped-call]
        name = bare_name(node.target).rpartition(":")[2].rpartition(".")[2] or "item"  # depends on the region alone
        copies[node] = graph.create_node("call_function", node.target, args, kwargs, name=name)
        set_values(copies[node], *values(node))
        set_origin(copies[node], origin(node))
        lines.append(f"{copies[node].name} = {_name(node.target)}{args}{kwargs}")
    graph.output(tuple(copies[node] for node in results))
    lines.append(f"return {[copies[node].name for node in results]}")
    return Region("\n".join(lines), graph, _symbols(graph, mesh))


def _symbols(graph: fx.Graph, mesh: Mesh) -> tuple[Any, ...]:
    """The sizes of a batch, by name, of which expressions in ``graph`` are made."""
    found: dict[str, Any] = {}

    def note(item: Any) -> None:
        if is_expression(item):
            found.update({str(symbol): symbol for symbol in item.free_symbols})
        elif isinstance(item, (tuple, list)):
            for each in item:
                note(each)

    for node in graph.nodes:
        note((*node.args, *node.kwargs.values()))
        note([kind.layout.local_shape(mesh) for kind in (values(node) if node.op != "output" else ())])
    return tuple(found[name] for name in sorted(found))


def _name(target: Any) -> str:
    return str(target) if is_overload(target) else f"{target.__module__}.{target.__name__}"
