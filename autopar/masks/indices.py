"""Where an element of a view comes from: the index in the tensor that is viewed, as a sum of letters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from autopar.ir.canonical_views import argument
from autopar.ir.node import value
from autopar.ir.rewrite import operand
from autopar.masks.values import ZERO, Affine

aten = torch.ops.aten

Index: TypeAlias = tuple[Affine, ...]


def aligned(index: Sequence[Affine], of: Sequence[int], to: Sequence[int]) -> Index:
    """The index in an operand of shape ``to`` that is broadcast to shape ``of``."""
    rest = index[len(of) - len(to) :]
    return tuple(entry if size != 1 else ZERO for entry, size in zip(rest, to))


def through_view(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """The viewed node and the index in it; None where ``node`` is no view, or one whose index is no sum."""
    step = _STEPS.get(node.target)
    found = step(node, index) if step else None
    return None if found is None else (operand(node), found)


def _expand(node: fx.Node, index: Index) -> Index:
    return aligned(index, value(node).shape, value(operand(node)).shape)


def _reshape(node: fx.Node, index: Index) -> Index | None:
    """Dims that are split or stay; merged ones only at a constant index."""
    inner, outer = value(operand(node)).shape, value(node).shape
    if math.prod(inner) == 0:
        return None
    found: list[Affine] = []
    position = 0
    for group, size in _groups(inner, outer):
        linear, factor = ZERO, 1
        taken = list[int]()
        while math.prod(taken) < size:
            taken.append(outer[position])
            position += 1
        for entry, length in zip(reversed(index[position - len(taken) : position]), reversed(taken)):
            linear, factor = linear.plus(entry.times(factor)), factor * length
        wide = [n for n, length in enumerate(group) if length > 1]
        if len(wide) > 1 and linear.factors:
            return None
        rest = linear.constant
        entries = []
        for length in reversed(group):
            entries.append(ZERO if length == 1 else linear if len(wide) == 1 else Affine((), rest % length))
            rest //= length
        found += reversed(entries)
    return tuple(found)


def _groups(inner: Sequence[int], outer: Sequence[int]) -> list[tuple[list[int], int]]:
    """The dims of ``inner`` in the smallest groups of which each holds as many elements as some dims of ``outer``."""
    ends = {math.prod(outer[:n]) for n in range(len(outer) + 1)}
    groups: list[tuple[list[int], int]] = []
    waiting, before = list[int](), 1
    for length in inner:
        waiting.append(length)
        total = before * math.prod(waiting)
        if total in ends:
            groups.append((waiting, total // before))
            waiting, before = [], total
    return groups


def _permute(node: fx.Node, index: Index) -> Index:
    dims = [int(dim) % len(index) for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    return tuple(index[dims.index(dim)] for dim in range(len(index)))


def _transpose(node: fx.Node, index: Index) -> Index:
    first, second = (int(dim) % len(index) for dim in node.args[1:3])  # type: ignore[arg-type]
    found = list(index)
    found[first], found[second] = found[second], found[first]
    return tuple(found)


def _slice(node: fx.Node, index: Index) -> Index:
    dim = argument(node, 1, "dim", 0) % len(index)
    start, step = argument(node, 2, "start", None) or 0, argument(node, 4, "step", 1)
    start = start + value(operand(node)).shape[dim] if start < 0 else start
    return (*index[:dim], index[dim].times(step).plus(Affine((), start)), *index[dim + 1 :])


def _select(node: fx.Node, index: Index) -> Index:
    shape = value(operand(node)).shape
    dim, position = (int(x) for x in node.args[1:3])  # type: ignore[arg-type]
    dim %= len(shape)
    return (*index[:dim], Affine((), position % shape[dim]), *index[dim:])


_STEPS: dict[Any, Callable[[fx.Node, Index], Index | None]] = {
    aten.expand.default: _expand,
    **dict.fromkeys(
        (
            aten.reshape.default,
            aten.view.default,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
        ),
        _reshape,
    ),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}
