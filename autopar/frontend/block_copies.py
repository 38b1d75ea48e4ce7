"""Writes the calls of a traced block in place of the operators that stand for blocks like it.

before (after two blocks that were traced):
  block_again(h2, parameters of block.2, like block.1)
after:
  the calls of block.1, on h2 and the parameters of block.2, with the origins of block.2

See :mod:`autopar.frontend.equal_blocks`. The graph is then what tracing each block would have given.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from autopar.frontend.equal_blocks import AGAIN, BEGINS, ENDS, BlocksDiffer, looks_like
from autopar.ir.arguments import flat_arguments
from autopar.ir.fast_graph import copied_node
from autopar.ir.node import copy_meta, copy_traced, set_traced_value, traced_modules, traced_value
from autopar.ir.operator_facts import is_composite, is_overload, writes

Node = fx.Node


@dataclass(frozen=True)
class _Region:
    """The nodes of a traced block."""

    begin: Node
    inner: tuple[Node, ...]
    end: Node

    @property
    def taken(self) -> tuple[Node, ...]:
        """Arguments, then parameters; as they are now, after blocks before this one were written out."""
        taken: Any = self.begin.args[0]
        return tuple(taken)

    @property
    def given(self) -> tuple[Node, ...]:
        """The results that it makes."""
        given: Any = self.end.args[0]
        return tuple(given)


def leave_out_partners(exported: ExportedProgram) -> dict[int, int]:
    """Let an operator stand for each block that was traced to be compared with the one behind it, if they are equal.

    Gives the number of that other one, which is proven then (:func:`write_out_blocks`), with the number of the first.
    Only where the graph may be decomposed before the blocks are written out (:func:`writes_within_blocks`): equal calls
    are decomposed alike.
    """
    graph, regions, proven = exported.graph, _regions(exported.graph), dict[int, int]()
    stand_ins = [node for node in graph.nodes if node.target is AGAIN]
    written = {node.args[2] for node in stand_ins}  # in place of others, and so to be decomposed
    for node in stand_ins:
        number, like = cast(tuple[int, int], node.args[1:])
        others = {one: region for one, region in regions.items() if one == like or one not in written}
        partner = _partner(others, like, {})  # with no constants of their own
        if like in proven or partner is None or any(map(_leaves_something, (regions[partner], regions[like]))):
            continue
        if not {*regions[partner].inner}.issuperset(regions[partner].given):
            continue
        looks_like(partner, number)
        _leave_out(regions.pop(partner), partner, like)
        proven[like] = partner
    return proven


def _partner(regions: Mapping[int, _Region], like: int, constants: Mapping[str, Tensor]) -> int | None:
    """The last block in front of one that is equal."""
    numbers = list(regions)
    earlier = reversed(numbers[: numbers.index(like)])
    return next((number for number in earlier if _is_equal(regions[number], regions[like], constants)), None)


def _leave_out(region: _Region, number: int, like: int) -> None:
    """A ``block_again`` in place of ``region``."""
    graph = region.begin.graph
    with graph.inserting_before(region.begin):
        again = graph.call_function(AGAIN, (list(region.taken), number, like))
        copy_meta(again, region.begin)
        set_traced_value(again, [traced_value(made) for made in region.given])
        items = {made: graph.call_function(operator.getitem, (again, n)) for n, made in enumerate(region.given)}
    for made, item in items.items():
        copy_meta(item, made)
        made.replace_all_uses_with(item, lambda user: user is not region.end and user not in region.inner)
    for node in (region.end, *reversed(region.inner), region.begin):
        graph.erase_node(node)
    for made, item in items.items():
        item.name = made.name  # which the signature may know


def write_out_blocks(exported: ExportedProgram, known: Collection[int] = ()) -> None:
    """Leave none of the operators of ``equal_blocks`` in the graph; ``known``: blocks that are proven already.

    Raises BlocksDiffer where two blocks that were taken for alike came out with other calls, or where an operator
    cannot be reached.
    """
    graph = exported.graph
    regions = _regions(graph)
    constants = _constants(exported)
    proven = {*known}
    for node in [node for node in graph.nodes if node.target is AGAIN]:
        like: Any = node.args[2]
        if like not in proven:
            if _partner(regions, like, constants) is None:
                raise BlocksDiffer(f"the calls of {_path(regions[like].begin)} differ from those of the block before")
            if _leaves_something(regions[like]):
                raise BlocksDiffer(f"what {_path(regions[like].begin)} computes is found elsewhere than in its results")
            proven.add(like)
        _write(node, regions[like])
    for node in [node for node in graph.nodes if node.target in (BEGINS, ENDS)]:
        graph.erase_node(node)
    if proven:
        number_calls(graph)
    inner = [part.graph for part in exported.graph_module.modules() if isinstance(part, fx.GraphModule)]
    if any(node.target in (BEGINS, ENDS, AGAIN) for part in inner for node in part.nodes):
        raise BlocksDiffer("export has made a graph of its own of what runs under torch.autocast or the like")


def writes_within_blocks(graph: fx.Graph) -> bool:
    """Whether each operator that writes, writes into what was made new in the same block, or before all blocks.

    Then the graph may be decomposed before the blocks are written out: no operator that stands for a block would have
    to write into what it takes, or give what shares memory with something that is written.
    """
    region = {inner: number for number, found in _regions(graph).items() for inner in found.inner}
    is_before = True
    for node in graph.nodes:
        is_before = is_before and node.target is not BEGINS
        if node.op == "get_attr":  # a graph of its own, which may write
            return False
        if _writes(node) and not is_before:
            made = [_made_by(source) for source in _written(node)]
            if node not in region or not all(source in region and region[source] == region[node] for source in made):
                return False
    return True


def _written(node: Node) -> list[Node]:
    target: Any = node.target
    arguments = target._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), node.args)), **node.kwargs}
    taken = [given.get(each.name) for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    return [source for source in pytree.tree_leaves(taken) if isinstance(source, Node)]


def _made_by(node: Node) -> Node | None:
    """The call that has made the memory in which the result of ``node`` lies; None where that may be no call."""
    while node.op == "call_function":
        target: Any = node.target
        is_part = target is operator.getitem
        if not (is_part or is_overload(target)):
            return None
        if is_part or any(result.alias_info is not None for result in target._schema.returns):  # a view, or the written
            node = node.all_input_nodes[0]
        else:
            return None if is_composite(target) else node  # a composite may give what it takes
    return None


def number_calls(graph: fx.Graph) -> None:
    """Number the calls of each operator in their order (``linear``, ``linear_1``), as tracing all of them would."""
    counts = Counter(node.name for node in graph.nodes if node.op != "call_function")
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        base = name = re.sub(r"(_\d+)+$", "", node.name)
        while counts[name]:
            name = f"{base}_{counts[base]}"
            counts[base] += 1
        counts[name] += 1
        node.name = name


def _regions(graph: fx.Graph) -> dict[int, _Region]:
    """By the number of the call. Regions do not overlap."""
    found: dict[int, _Region] = {}
    begin: Node | None = None
    inner: list[Node] = []
    for node in graph.nodes:
        args: Any = node.args
        if node.target is BEGINS:
            begin, inner = node, []
        elif node.target is ENDS:
            assert begin is not None and begin.args[1] == args[1], node
            found[args[1]] = _Region(begin, tuple(inner), node)
            begin = None
        elif begin is not None:
            inner.append(node)
    return found


def _constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that forward made of numbers, by the names of their placeholders."""
    specs = exported.graph_signature.input_specs
    named = {getattr(spec.arg, "name", ""): exported.constants.get(spec.target or "") for spec in specs}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}


def _is_equal(one: _Region, other: _Region, constants: Mapping[str, Tensor]) -> bool:
    """Whether both are the same calls of what they take, and of the same values from elsewhere."""
    if len(one.inner) != len(other.inner) or len(one.taken) != len(other.taken):
        return False
    partner = dict(zip(one.taken, other.taken))

    def same(mine: Any, its: Any) -> bool:
        if not isinstance(mine, Node) or not isinstance(its, Node):
            return type(mine) is type(its) and repr(mine) == repr(its)
        if mine in partner:
            return partner[mine] is its
        return mine is its or _is_same_constant(mine, its, constants)

    for mine, its in zip(one.inner, other.inner):
        if mine.op != "call_function" or mine.op != its.op or mine.target is not its.target:
            return False
        (taken, shape), (others, other_shape) = flat_arguments(mine), flat_arguments(its)
        if shape != other_shape or not all(map(same, taken, others)):
            return False
        if not _looks_equal(traced_value(mine), traced_value(its)):
            return False
        partner[mine] = its
    return len(one.given) == len(other.given) and all(map(same, one.given, other.given))


def _leaves_something(region: _Region) -> bool:
    """Whether other calls use what the block computes and does not return, as from a variable of a thread."""
    kept = {*region.inner, *region.given}
    hidden = [node for node in region.inner if node not in region.given and not _writes(node)]
    return any(user not in kept and user.target is not ENDS for node in hidden for user in node.users)


def _writes(node: Node) -> bool:
    return is_overload(node.target) and writes(node.target)


def _is_same_constant(one: Node, other: Node, constants: Mapping[str, Tensor]) -> bool:
    if one.name not in constants or other.name not in constants:
        return False
    mine, its = constants[one.name], constants[other.name]
    return mine.dtype == its.dtype and mine.device == its.device and torch.equal(mine, its)


def _looks_equal(one: Any, other: Any) -> bool:
    """Sizes that are known only when the graph runs are never equal: each call has its own."""
    leaves = [pytree.tree_leaves(item) for item in (one, other)]
    if len(leaves[0]) != len(leaves[1]):
        return False
    for mine, its in zip(*leaves):
        if isinstance(mine, Tensor) and isinstance(its, Tensor):
            sizes = [(*item.shape, *item.stride()) for item in (mine, its)]
            if not all(type(size) is int for size in sizes[0]) or sizes[0] != sizes[1] or mine.dtype != its.dtype:
                return False
        elif type(mine) is not type(its) or isinstance(mine, torch.SymInt):
            return False
    return True


def _write(node: Node, region: _Region) -> None:
    """The calls of ``region`` in place of ``node``, a ``block_again``."""
    graph = node.graph
    taken: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    copies, given = dict(zip(region.taken, taken)), region.given
    before, after = traced_modules(region.begin), traced_modules(node)
    with graph.inserting_before(node):
        for inner in region.inner:
            copy = copied_node(graph, inner, lambda source: copies.get(source, source))
            copy_traced(copy, inner, _restacked(traced_modules(inner), before, after))
            copies[inner] = copy
    for user in list(node.users):
        made = given[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(copies.get(made, made))
        graph.erase_node(user)
    graph.erase_node(node)


def _path(node: Node) -> str:
    modules = [path for path, _ in traced_modules(node).values()]
    return modules[-1] if modules else "a block"


def _restacked(
    stack: Mapping[str, tuple[str, Any]], before: Mapping[str, Any], after: Mapping[str, tuple[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """The modules around a call of the block at the end of ``after``, from those around one of ``before``."""
    (old, _), (new, _) = list(before.values())[-1], list(after.values())[-1]
    inner = {key: entry for key, entry in stack.items() if key not in before}
    return {**after, **{f"{new}|{key}": (new + path.removeprefix(old), kind) for key, (path, kind) in inner.items()}}
