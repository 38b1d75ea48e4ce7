"""Calls that differ in the number of an expert alone, as one call on tensors with a first dim for the experts.

``Batch.of((f(w[0], x), f(w[1], x), ...))`` is ``f(w, x)``, computed for all experts together. What differs must be a
stack's element, a parameter for each expert, or the number that ids are compared with; all else must be equal.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopar.experts.tracked import is_elementwise
from autopar.ir.builder import Builder
from autopar.ir.node import origin, set_origin, value, values
from autopar.ir.operator_facts import argument_names, is_operator, is_random
from autopar.ir.rewrite import operand

aten = torch.ops.aten


class Unlike(Exception):
    """The calls differ in something else."""


Alike = tuple[fx.Node, ...]  # one node for each expert, in order

_SHIFTED = {
    aten.sum.dim_IntList, aten.mean.dim, aten.any.dim, aten.softmax.int, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.glu.default, aten.permute.default, aten.cumsum.default,
}  # fmt: skip
_DIMS = ("dim", "dims", "dim0", "dim1")


class Batch:
    """Inserts calls for all experts in front of one node."""

    def __init__(self, before: fx.Node) -> None:
        self.op = Builder(before=before)
        self._known: dict[Alike, fx.Node] = {}

    def of(self, alike: Alike) -> fx.Node:
        """The values of ``alike``, stacked along a new first dim. Raises Unlike."""
        if alike not in self._known:
            first = alike[0]
            if any(values(node) != values(first) for node in alike):
                raise Unlike(first)
            self._known[alike] = self._elements(alike) or self._call(alike)
            set_origin(self._known[alike], origin(first))
        return self._known[alike]

    def _side(self, alike: Alike) -> tuple[fx.Node, bool]:
        """A value of all experts, and whether it has the first dim; it has none where all share one value."""
        if all(node is alike[0] for node in alike):
            return alike[0], False
        return self.of(alike), True

    # ---------------------------------------------------------------- what differs

    def _elements(self, alike: Alike) -> fx.Node | None:
        """The whole of which ``alike`` are the elements 0, 1, ...; None where they are no such elements."""
        first = alike[0]
        if all(node.op == "placeholder" for node in alike):
            return self.op(aten.stack.default, list(alike), 0)
        if any(node.target is not first.target for node in alike) or first.op != "call_function":
            return None
        if first.target is operator.getitem:
            return self._unbound(alike)
        if first.target not in (aten.eq.Scalar, aten.select.int, aten.slice.Tensor):
            return None
        whole = operand(first)
        if any(node.args[0] is not whole for node in alike):
            return None
        if first.target is aten.eq.Scalar and [node.args[1] for node in alike] == list(range(len(alike))):
            marks = self.op(aten.one_hot.default, whole, len(alike))
            return self.op.cast(self._first(marks, len(value(whole).shape)), torch.bool)
        if first.target is aten.select.int and len({node.args[1] for node in alike}) == 1:
            numbers = [node.args[2] for node in alike]
            return self._cut(whole, first.args[1], numbers, len(alike))
        if first.target is aten.slice.Tensor and len({node.args[1] for node in alike}) == 1:
            numbers = [node.args[2] for node in alike if node.args[3] == node.args[2] + 1]  # type: ignore[operator]
            found = self._cut(whole, first.args[1], numbers, len(alike))
            return None if found is None else self.op(aten.unsqueeze.default, found, 1 + int(first.args[1]))  # type: ignore[arg-type]
        return None

    def _unbound(self, alike: Alike) -> fx.Node | None:
        parent = operand(alike[0])
        if parent.target is not aten.unbind.int or any(node.args[0] is not parent for node in alike):
            return None
        return self._cut(operand(parent), (*parent.args[1:], 0)[0], [node.args[1] for node in alike], len(alike))

    def _cut(self, whole: fx.Node, dim: Any, numbers: Sequence[Any], count: int) -> fx.Node | None:
        shape = value(whole).shape
        dim %= len(shape)
        if numbers != list(range(count)) or shape[dim] != count:
            return None
        return self._first(whole, dim)

    def _first(self, node: fx.Node, dim: int) -> fx.Node:
        """``node`` with a dim moved to the front."""
        order = [dim, *(i for i in range(len(value(node).shape)) if i != dim)]
        return node if dim == 0 else self.op(aten.permute.default, node, order)

    # ---------------------------------------------------------------- one call for all

    def _call(self, alike: Alike) -> fx.Node:
        first = alike[0]
        texts = {repr(fx.map_arg((node.args, node.kwargs), lambda x: None)) for node in alike}
        if len(texts) != 1 or any(node.target is not first.target for node in alike):
            raise Unlike(first)
        if first.target is operator.getitem:
            return self.op(operator.getitem, self.of(tuple(map(operand, alike))), first.args[1])
        if not is_operator(first) or is_random(first.target):
            raise Unlike(first)
        sources: list[list[fx.Node]] = []
        for node in alike:
            sources.append([])
            fx.map_arg((node.args, node.kwargs), sources[-1].append)
        sides = [self._side(each) for each in zip(*sources)]
        if not any(stacked for _, stacked in sides):  # one value, written for each
            raise Unlike(first)
        batch = BATCHES.get(first.target) or (_pointwise if is_elementwise(first.target) else None)
        if batch is None and first.target in _SHIFTED:
            batch = _shifted
        found = batch(self.op, first, sides, len(alike)) if batch else None
        wanted = [(kind.dtype, (len(alike), *kind.shape)) for kind in values(first)]
        if found is None or [(kind.dtype, kind.shape) for kind in values(found)] != wanted:
            raise Unlike(first)
        return found


Sides = Sequence[tuple[fx.Node, bool]]


def _again(op: Builder, node: fx.Node, new: Sequence[fx.Node], **changed: Any) -> fx.Node:
    """The call of ``node`` on ``new`` operands, with some arguments changed."""
    names, rest = argument_names(node.target), iter(new)
    given = [changed.get(name, argument) for name, argument in zip(names, node.args)]
    arguments: Any = fx.map_arg((given, dict(node.kwargs)), lambda x: next(rest))
    return op(node.target, *arguments[0], **arguments[1])


def _ranked(op: Builder, side: tuple[fx.Node, bool], rank: int) -> fx.Node:
    """A value with the first dim, with ``rank`` dims behind it; one without stays, and is broadcast."""
    node, stacked = side
    shape = value(node).shape
    return op.reshape(node, shape[0], *[1] * (rank + 1 - len(shape)), *shape[1:]) if stacked else node


def _pointwise(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node:
    rank = len(value(node).shape)
    return _again(op, node, [_ranked(op, side, rank) for side in sides])


def _shifted(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node | None:
    """An operator of one tensor that works along dims."""
    if len(sides) != 1:
        return None
    given: dict[str, Any] = dict(zip(argument_names(node.target), node.args))
    moved = {name: _behind_the_first(given[name]) for name in _DIMS if name in given}
    if node.target is aten.permute.default:
        moved = {"dims": [0, *(dim % len(given["dims"]) + 1 for dim in given["dims"])]}
    return _again(op, node, [sides[0][0]], **moved)


def _behind_the_first(dims: Any) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_behind_the_first(dim) for dim in dims]
    return dims + 1 if dims >= 0 else dims


def _reshape(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node:
    return op.reshape(sides[0][0], count, *value(node).shape)


def _expand(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node:
    shape = value(node).shape
    return op(aten.expand.default, _ranked(op, sides[0], len(shape)), [count, *shape])


def _product(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node | None:
    """``mm`` and ``matmul`` of matrices, whose leading dims are broadcast."""
    ranks = [len(value(side).shape) - stacked for side, stacked in sides]
    if min(ranks) < 2:
        return None
    return op(aten.matmul.default, *(_ranked(op, side, max(ranks)) for side in sides))


def _linear(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node | None:
    (rows, _), (weight, own), *bias = sides
    if not own:
        return _again(op, node, [side for side, _ in sides]) if not any(stacked for _, stacked in bias) else None
    shape, width = value(node).shape, value(rows).shape[-1]
    tokens = math.prod(shape[:-1])
    flat = op.reshape(rows, *([count] if sides[0][1] else []), tokens, width)
    product = op(aten.matmul.default, flat, op(aten.transpose.int, weight, 1, 2))
    product = op.reshape(product, count, *shape)
    return op(aten.add.Tensor, product, _ranked(op, bias[0], len(shape))) if bias else product


def _einsum(op: Builder, node: fx.Node, sides: Sides, count: int) -> fx.Node | None:
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    letter = next(letter for letter in string.ascii_letters if letter not in left)
    if not arrow:
        return None
    terms = [letter * stacked + term for term, (_, stacked) in zip(left.split(","), sides)]
    return op(aten.einsum.default, f"{','.join(terms)}->{letter}{right}", [side for side, _ in sides])


BATCHES: Mapping[Any, Callable[[Builder, fx.Node, Sides, int], fx.Node | None]] = {
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.mm.default: _product,
    aten.matmul.default: _product,
    aten.linear.default: _linear,
    aten.einsum.default: _einsum,
}
