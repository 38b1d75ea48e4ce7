"""Conditions that say which rows chose which expert: the elements where a tensor of ids has one number.

``chosen == 3``, one slice of ``chosen.unsqueeze(-1) == arange(experts)``, one slice of a one-hot form of ``chosen``:
an element of the condition is followed back through views and casts to the comparison that gives it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir.node import value, values
from autopar.ir.rewrite import operand

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.clone.default, aten.contiguous.default}
IS_NONZERO = {aten.ne.Scalar, aten.gt.Scalar, aten.greater.Scalar, aten.not_equal.Scalar}
VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
SORTS = {aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable}
INDICES = frozenset((torch.int32, torch.int64))
FILLED = {aten.full.default, aten.scalar_tensor.default}


@dataclass(frozen=True)
class At:
    """One index along a dim."""

    index: int


Place = int | At  # along a dim of a tensor: a dim of the condition, or one index


@dataclass(frozen=True)
class Choice:
    """A condition: ``condition[i0, i1, ...] == (ids[...] == number)``.

    ``dims``: for each dim of ``ids`` the dim of the condition that it is.
    """

    ids: fx.Node
    dims: tuple[int, ...]
    number: int

    @property
    def is_exclusive(self) -> bool:
        """Whether no row has the number twice along the last dim of ``ids``."""
        return choices_differ(self.ids)


def choice_of(condition: fx.Node) -> Choice | None:
    """The comparison that ``condition`` is; None where it is something else."""
    rank = len(value(condition).shape)
    node, places = behind_views(condition, list(range(rank)))
    if node.target is aten.one_hot.default and isinstance(places[-1], At):
        return _chosen(operand(node), places[:-1], places[-1].index, rank)
    if node.target is aten.eq.Scalar and isinstance(node.args[1], int):
        return _chosen(operand(node), places, node.args[1], rank)
    if node.target is not aten.eq.Tensor:
        return None
    sides = [
        behind_views(side, _broadcast(places, node, side), INDICES) for side in (operand(node, 0), operand(node, 1))
    ]
    for (ids, own), other in (sides, reversed(sides)):
        number = _number(*other)
        if number is not None:
            return _chosen(ids, own, number, rank)
    return None


def is_choice(condition: fx.Node) -> bool:
    """Whether the elements of ``condition``, or of what it asks for any of, are those where ids have one number."""
    source = operand(condition) if condition.target is aten.any.dim else condition
    return choice_of(source) is not None


def _chosen(ids: fx.Node, places: Sequence[Place], number: int, rank: int) -> Choice | None:
    ids, places = behind_views(ids, places, INDICES)
    dims = tuple(place for place in places if isinstance(place, int))
    if len(dims) != len(places) or sorted(dims) != list(range(rank)) or value(ids).dtype.is_floating_point:
        return None
    return Choice(ids, dims, number)


def _broadcast(places: Sequence[Place], result: fx.Node, source: fx.Node) -> list[Place]:
    """The places in an operand of those in a result to which it is broadcast."""
    shape = value(source).shape
    skipped = len(places) - len(shape)
    sizes = zip(places[skipped:], value(result).shape[skipped:], shape)
    return [At(0) if own == 1 and size != 1 else place for place, size, own in sizes]


def _number(node: fx.Node, places: Sequence[Place]) -> int | None:
    """The whole number that ``node`` has at ``places``, where the graph tells it."""
    if node.target in FILLED:
        number = node.args[-1]
        return number if isinstance(number, int) else None
    (place,) = places if len(places) == 1 else (None,)
    if not isinstance(place, At):
        return None
    if node.target is aten.arange.default:
        return place.index
    if node.target not in (aten.arange.start, aten.arange.start_step):
        return None
    start, _, step = (*node.args, 1)[:3]
    return start + place.index * step if isinstance(start, int) and isinstance(step, int) else None


# ---------------------------------------------------------------- elements behind views


def behind_views(
    node: fx.Node, places: Sequence[Place], dtypes: Set[torch.dtype] = frozenset()
) -> tuple[fx.Node, list[Place]]:
    """The tensor of which ``node`` is a view or a cast, and the places there of an element of ``node``.

    ``dtypes``: those between which a cast keeps all values; any (none given) keeps the zeros and ones of a condition.
    """
    found = list(places)
    while (step := _step(node, found)) is not None:
        if dtypes and not {value(node).dtype, value(step[0]).dtype} <= dtypes:
            break
        node, found = step
    return node, found


def _step(node: fx.Node, places: list[Place]) -> tuple[fx.Node, list[Place]] | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        parts, index = node.args
        if isinstance(parts, fx.Node) and parts.target is aten.unbind.int and isinstance(index, int):
            return _inserted(parts, places, parts.args[1] if len(parts.args) > 1 else 0, index)
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(values(source)) != 1:
        return None
    shape = value(source).shape
    if node.target in CASTS or (node.target in IS_NONZERO and node.args[1] == 0):
        return source, places
    if node.target is aten.select.int:
        return _inserted(node, places, node.args[1], node.args[2])
    return _through_view(node, source, shape, places)


def _inserted(node: fx.Node, places: list[Place], dim: Any, index: Any) -> tuple[fx.Node, list[Place]] | None:
    source = operand(node)
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    shape = value(source).shape
    dim %= len(shape)
    return source, [*places[:dim], At(index % shape[dim]), *places[dim:]]


def _through_view(
    node: fx.Node, source: fx.Node, shape: tuple[int, ...], places: list[Place]
) -> tuple[fx.Node, list[Place]] | None:
    """Back through a view that keeps every element, or cuts at constant bounds."""
    rank = len(shape)
    if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        order = list(range(rank))
        if node.target is aten.permute.default:
            order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
        else:
            a, b = (int(dim) % rank for dim in (node.args[1:] or (0, rank - 1)))  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return source, [places[order.index(dim)] for dim in range(rank)]
    if node.target is aten.slice.Tensor:
        dim, start = (int(x or 0) for x in (*node.args[1:3], *(0, 0)[len(node.args) - 1 :]))  # type: ignore[arg-type]
        return _sliced(node, source, dim % rank, start, places)
    if node.target in VIEWS or node.target in (
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default
    ):  # fmt: skip
        return _between_ones(source, shape, value(node).shape, places)
    return None


def _sliced(
    node: fx.Node, source: fx.Node, dim: int, start: int, places: list[Place]
) -> tuple[fx.Node, list[Place]] | None:
    size, place = value(source).shape[dim], places[dim]
    if len(node.args) > 4 and node.args[4] != 1:
        return None
    if value(node).shape[dim] == size:
        return source, places
    if value(node).shape[dim] == 1:
        place = At(0)
    if not isinstance(place, At):
        return None
    first = start if start >= 0 else start + size
    return source, [*places[:dim], At(place.index + first), *places[dim + 1 :]]


def _between_ones(
    source: fx.Node, before: tuple[int, ...], after: tuple[int, ...], places: list[Place]
) -> tuple[fx.Node, list[Place]] | None:
    """Back through a reshape that only adds and removes dims of size 1."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    own = iter([place for place, size in zip(places, after) if size != 1])
    ones = [place for place, size in zip(places, after) if size == 1 and isinstance(place, int)]
    kept: list[Place] = []
    for size in before:
        kept.append(next(own) if size != 1 else (ones.pop(0) if ones else At(0)))
    return None if ones else (source, kept)


# ---------------------------------------------------------------- what is known of ids


def choices_differ(ids: fx.Node) -> bool:
    """Whether no number occurs twice along the last dim of ``ids``: the largest few, an order, or one of them."""
    if value(ids).shape and value(ids).shape[-1] == 1:
        return True
    found = _ranking(ids)
    return found is not None and found[1]


def experts_of(ids: fx.Node) -> int | None:
    """The number below which all of ``ids`` are, and none of them is negative; None where nothing says so."""
    found = _ranking(ids)
    return None if found is None else found[0]


def _ranking(ids: fx.Node) -> tuple[int, bool] | None:
    """(candidates, whether they differ along the last dim), where ``ids`` are places of large elements in a tensor."""
    last_dim_kept = True
    while ids.target in VIEWS | CASTS | {aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor}:
        source = operand(ids)
        shape, whole = value(ids).shape, value(source).shape
        if ids.target not in CASTS and ids.target is not aten.slice.Tensor:
            last_dim_kept &= bool(shape) and bool(whole) and shape[-1] == whole[-1]
        ids = source
    if ids.target is aten.argmax.default and len(ids.args) > 1 and isinstance(ids.args[1], int):
        return value(operand(ids)).shape[ids.args[1]], False
    if ids.target in (aten.argsort.default, aten.argsort.stable):
        ranked, dims = ids, [ids.kwargs.get("dim", ids.args[1] if len(ids.args) > 1 else -1)]
    elif ids.target is operator.getitem and ids.args[1] == 1:
        ranked = operand(ids)
        if ranked.target in (aten.max.dim, aten.min.dim):
            return value(operand(ranked)).shape[ranked.args[1]], False  # type: ignore[index]
        if ranked.target not in SORTS and ranked.target is not aten.topk.default:
            return None
        position = 2 if ranked.target in (aten.topk.default, aten.sort.stable) else 1
        dims = [ranked.kwargs.get("dim", ranked.args[position] if len(ranked.args) > position else -1)]
    else:
        return None
    shape = value(operand(ranked)).shape
    (dim,) = dims
    assert isinstance(dim, int)
    return shape[dim], last_dim_kept and dim % len(shape) == len(shape) - 1 and math.prod(shape) > 0
