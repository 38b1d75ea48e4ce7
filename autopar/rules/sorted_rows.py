"""Rows that are permuted, computed on and put back: where each row is treated alone, their order does not matter.

``SortedRows`` follows a permutation (the result of ``sort`` or ``argsort`` of a vector) through the graph. The
splitting rule of an operator tells whether it treats each row alone: a dim that may be cut anywhere has independent
rows.
"""

from __future__ import annotations

import enum
import heapq
import operator
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.ir.builder import Builder
from autopar.ir.node import Value, value, values
from autopar.ir.operator_facts import argument_names
from autopar.ir.program import Program
from autopar.ir.rewrite import operand, substitute
from autopar.ir.tables import InputKind
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Dims

aten = torch.ops.aten

SORTS = (aten.sort.default, aten.sort.stable)
PERMUTES = (*SORTS, aten.argsort.default)
_SHAPE_ONLY = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}


class Kind(enum.Enum):
    """The relation of a value to the permutation."""

    SOURCE = enum.auto()  # for each sorted row, its first position (``order``), or its whole row (``order // k``)
    INVERSE = enum.auto()  # the new position of each row
    ROWS = enum.auto()  # dim 0 is in the sorted order
    RESTORED = enum.auto()  # it is in the first order again


class SortedRows:
    """The part of a graph between one permutation and its inverse. ``closed`` says whether it may be removed."""

    def __init__(self, program: Program, permutation: fx.Node) -> None:
        self.program, self.permutation = program, permutation
        self.length = values(permutation)[0].shape[0]
        self.kinds: dict[fx.Node, Kind] = {}
        self.divisors: dict[fx.Node, int] = {}  # of each SOURCE
        self.replaced: dict[fx.Node, Callable[[fx.Node], fx.Node]] = {}
        self.closed = self._follow() and Kind.RESTORED in self.kinds.values()

    @classmethod
    def made_by(cls, program: Program, node: fx.Node) -> SortedRows | None:
        """The rows that ``node``, a sort or argsort of a vector, permutes; None for any other node."""
        if node.target not in PERMUTES or len(value_of_operand(node).shape) != 1:
            return None
        return cls(program, node)

    def remove(self) -> None:
        """Compute the rows in their first order. The nodes between stay as they are; unused ones stay too."""
        for node, replacement in self.replaced.items():
            substitute(node, replacement(node))

    def _follow(self) -> bool:
        """Find the kind of every value that depends on the permutation; False if some value has none."""
        if self.permutation.target is aten.argsort.default:
            self._source(self.permutation, 1)
        waiting = list(self.permutation.users)
        heapq.heapify(waiting)
        seen = set(waiting)
        while waiting:  # in the order of the graph: a model has as many sorts as layers, and most of it depends on none
            node = heapq.heappop(waiting)
            if not self._note(node):
                return False
            if self.kinds.get(node, Kind.RESTORED) is not Kind.RESTORED:
                new = [user for user in node.users if user not in seen]
                seen.update(new)
                for user in new:
                    heapq.heappush(waiting, user)
        return True

    def _note(self, node: fx.Node) -> bool:
        if node.target is operator.getitem and node.args[0] is self.permutation:
            if node.args[1] == 1:
                return self._source(node, 1)
            return self._row(node, lambda item: operand(operand(item)))
        touched = [self.kinds[x] for x in node.all_input_nodes if self.kinds.get(x, Kind.RESTORED) != Kind.RESTORED]
        if not touched:
            return True
        if node.op == "output":
            return False
        special = SPECIAL.get(node.target)
        return bool(special and special(self, node)) or (set(touched) == {Kind.ROWS} and self._treats_rows_alone(node))

    def _source(self, node: fx.Node, divisor: int) -> bool:
        self.kinds[node], self.divisors[node] = Kind.SOURCE, divisor
        return True

    def _row(self, node: fx.Node, replacement: Callable[[fx.Node], fx.Node] | None = None) -> bool:
        self.kinds[node] = Kind.ROWS
        if replacement:
            self.replaced[node] = replacement
        return True

    def _restored(self, node: fx.Node, replacement: Callable[[fx.Node], fx.Node]) -> bool:
        self.kinds[node], self.replaced[node] = Kind.RESTORED, replacement
        return True

    def _treats_rows_alone(self, node: fx.Node) -> bool:
        """Whether the operator treats each row alike, whatever the others are: then a row may be at any position."""
        if node.target is operator.getitem:
            return self._row(node)
        rule = rule_for(node.target)
        if rule is None:
            return False
        call = call_of(node, self.program.mesh)
        factoring = rule(call)
        tensors = [(dims, self.kinds.get(x) is Kind.ROWS) for x, dims in zip(call.operands, factoring.inputs)]
        tensors += [(dims, True) for dims in factoring.outputs]
        firsts = {_first(dims, factoring.sizes) for dims, sorted_ in tensors if sorted_}
        if len(firsts) != 1:
            return False
        (rows,) = firsts
        if rows is None or rows in factoring.whole | factoring.plain | set(factoring.rewrites):
            return False
        others = [factors for dims, sorted_ in tensors for factors in (dims[1:] if sorted_ else dims)]
        return all(rows not in factors for factors in others) and self._row(node)


def _first(dims: Dims, sizes: Any) -> str | None:
    """The one factor of dim 0."""
    factors = [factor for factor in dims[0] if sizes[factor] != 1] if dims else []
    return factors[0] if len(factors) == 1 else None


def value_of_operand(node: fx.Node, position: int = 0) -> Value:
    return value(operand(node, position))


# ---------------------------------------------------------------- operators on the permutation itself


def _cast(region: SortedRows, node: fx.Node) -> bool:
    source = operand(node)
    if region.kinds[source] is Kind.ROWS or value(node).dtype.is_floating_point:
        return False
    region.kinds[node] = region.kinds[source]
    region.divisors |= {node: region.divisors[source]} if source in region.divisors else {}
    return True


def _divided(region: SortedRows, node: fx.Node) -> bool:
    """``order // k``: for each sorted row, the row of which it is one of k parts."""
    source, k = node.args[:2]
    floor = node.target is aten.floor_divide.default or node.kwargs.get("rounding_mode") in ("floor", "trunc")
    if region.divisors.get(source) != 1 or not isinstance(k, int) or k < 1 or region.length % k or not floor:  # type: ignore[arg-type]
        return False
    return region._source(node, k)


def _unread(region: SortedRows, node: fx.Node) -> bool:
    """An operator that uses only the shape of its operand."""
    return region.kinds[operand(node)] is not Kind.ROWS


def _argsort(region: SortedRows, node: fx.Node) -> bool:
    if region.divisors.get(operand(node)) != 1 or descending(node):
        return False
    region.kinds[node] = Kind.INVERSE
    return True


def _index(region: SortedRows, node: fx.Node) -> bool:
    rows, place = operand(node), _only_index(node)
    return place is not None and _picked(region, node, rows, place)


def _index_select(region: SortedRows, node: fx.Node) -> bool:
    dim, place = node.args[1:3]
    first = isinstance(dim, int) and dim == 0
    return first and isinstance(place, fx.Node) and _picked(region, node, operand(node), place)


def _picked(region: SortedRows, node: fx.Node, rows: fx.Node, place: fx.Node) -> bool:
    inside = region.kinds.get(rows, Kind.RESTORED)
    if region.kinds.get(place) is Kind.INVERSE and inside is Kind.ROWS:
        return region._restored(node, operand)
    k = region.divisors.get(place, 0)
    if inside is not Kind.RESTORED or not k or value(rows).shape[0] * k != region.length:
        return False
    return region._row(node, lambda picked: _repeated(picked, k))


def _repeated(node: fx.Node, k: int) -> fx.Node:
    """A node with each row of the operand of ``node`` k times."""
    return operand(node) if k == 1 else Builder(before=node)(aten.repeat_interleave.self_int, operand(node), k, 0)


def _put(region: SortedRows, node: fx.Node) -> bool:
    """``base[order] = arange(n)`` is the inverse; ``base[order] = rows`` puts rows back; ``+=`` adds them up."""
    base, place, rows = operand(node), _only_index(node), operand(node, 2)
    adds = bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))
    if place is None or region.kinds.get(place) is not Kind.SOURCE:
        return False
    if adds:
        return _added(region, node, base, place, rows)
    if region.divisors[place] != 1 or value(base).shape[0] != region.length:
        return False
    if region.kinds.get(rows) is Kind.ROWS and value(rows).shape == value(base).shape:
        return region._restored(node, lambda put: operand(put, 2))
    if not is_arange(region.program, rows, region.length):
        return False
    region.kinds[node] = Kind.INVERSE
    return True


def _index_add(region: SortedRows, node: fx.Node) -> bool:
    if len(node.args) != 4 or node.args[1] != 0 or node.kwargs:
        return False
    return _added(region, node, operand(node), operand(node, 2), operand(node, 3))


def _added(region: SortedRows, node: fx.Node, base: fx.Node, place: fx.Node, rows: fx.Node) -> bool:
    """Rows added to the rows of which they are parts: ``base + rows.reshape(T, k, ...).sum(1)``."""
    k = region.divisors.get(place, 0)
    shape, (count, *rest) = list(value(base).shape), value(rows).shape
    fits = count == region.length and shape == [count // k, *rest] if k else False
    if region.kinds.get(rows) is not Kind.ROWS or base in region.kinds or not fits:
        return False
    position = node.all_input_nodes.index(rows)

    def total(found: fx.Node) -> fx.Node:
        parts, op = found.all_input_nodes[position], Builder(before=found)
        if k > 1:
            parts = op(aten.sum.dim_IntList, op(aten.reshape.default, parts, [count // k, k, *rest]), [1])
        return op(aten.add.Tensor, operand(found), parts)

    return region._restored(node, total)


def _only_index(node: fx.Node) -> fx.Node | None:
    """The index i of ``x[i]`` or ``x[i, :, ...]``; None for other indexing."""
    slots = node.args[1]
    assert isinstance(slots, (list, tuple))
    found = slots[0] if all(slot is None for slot in slots[1:]) else None
    return found if isinstance(found, fx.Node) and len(value(found).shape) == 1 else None


def descending(node: fx.Node) -> bool:
    """Whether a sort or argsort puts the largest first."""
    return bool(dict(zip(argument_names(node.target), node.args), **node.kwargs).get("descending", False))


def is_arange(program: Program, node: fx.Node, length: int) -> bool:
    """Whether ``node`` is 0, 1, ..., length - 1."""
    if node.target is aten.arange.default:
        return node.args == (length,)
    if node.op != "placeholder" or value(node).shape != (length,):
        return False  # before the search among all inputs: a deep model asks for each of its layers
    entry = next(entry for entry in program.inputs if entry.node == node.name)
    tensor = program.constants[entry.target] if entry.kind is InputKind.CONSTANT else None
    if tensor is None or isinstance(tensor, FakeTensor):
        return False
    if node not in _ARANGES:
        _ARANGES[node] = bool((tensor == torch.arange(length)).all())
    return _ARANGES[node]


_ARANGES: WeakKeyDictionary[fx.Node, bool] = WeakKeyDictionary()  # each layer of experts asks for the rows of one batch


SPECIAL: dict[Any, Callable[[SortedRows, fx.Node], bool]] = {
    aten._to_copy.default: _cast,
    aten.floor_divide.default: _divided,
    aten.div.Tensor_mode: _divided,
    **dict.fromkeys(_SHAPE_ONLY, _unread),
    aten.argsort.default: _argsort,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_put.default: _put,
    aten.index_add.default: _index_add,
}
