"""Operators that work on each element alone: every dim may be split, dims of size 1 are broadcast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar.rules.factoring import Call, Dims, Factoring, Shape

aten = torch.ops.aten

# operands in which an operator is jointly linear, so that a pending sum may pass through it
_LINEAR: dict[Any, tuple[frozenset[int], ...]] = {
    **{op: (frozenset({0, 1}),) for op in (aten.add.Tensor, aten.sub.Tensor)},
    aten.mul.Tensor: (frozenset({0}), frozenset({1})),
    aten.div.Tensor: (frozenset({0}),),
    **{op: (frozenset({0}),) for op in (aten.neg.default, aten.clone.default, aten.mul.Scalar, aten.div.Scalar)},
    aten.where.self: (frozenset({1, 2}),),
}


def broadcast_dims(shape: Shape, rank: int) -> Dims:
    """Factors ``d1, d2, ...`` counted from the last dim, as broadcasting aligns them; none for a dim of size 1."""
    return tuple((f"d{len(shape) - i}",) if size != 1 else () for i, size in enumerate(shape))


def broadcast(call: Call) -> Factoring:
    """``f(a, b, ...)`` element by element with numpy's broadcasting."""
    rank = max((len(shape) for shape in call.outputs), default=0)
    sizes: dict[str, int] = {}
    for shape in (*call.inputs, *call.outputs):
        for i, size in enumerate(shape):
            if size != 1:
                sizes[f"d{len(shape) - i}"] = size
    return Factoring(
        tuple(broadcast_dims(shape, rank) for shape in call.inputs),
        tuple(broadcast_dims(shape, rank) for shape in call.outputs),
        sizes,
        uneven=frozenset(sizes),
        linear=_linear(call),
    )


def _linear(call: Call) -> tuple[frozenset[int], ...]:
    groups = _LINEAR.get(call.target, ())
    if call.target in (aten.add.Tensor, aten.sub.Tensor, aten.where.self) and len(call.operands) < max(
        len(group) for group in groups
    ):
        return ()  # x + 1.0 is not linear in x
    if call.target is aten.where.self and len(call.operands) != 3:
        return ()
    return tuple(group for group in groups if max(group) < len(call.operands))


def _cast(call: Call) -> Factoring:
    """A cast between floating dtypes; a pending sum waits until after it only if nothing is rounded twice."""
    return replace(broadcast(call), linear=())


RULES: dict[Any, Any] = {
    aten._to_copy.default: _cast,
    aten.clone.default: broadcast,
    aten.detach.default: broadcast,
    aten.dropout.default: broadcast,
    aten.masked_fill.Scalar: broadcast,
    aten.masked_fill.Tensor: broadcast,
    aten.zeros_like.default: broadcast,
    aten.ones_like.default: broadcast,
    aten.full_like.default: broadcast,
    aten.logical_not.default: broadcast,
    aten.fill.Scalar: broadcast,
    aten.copy.default: broadcast,
    torch.ops.aten.floor_divide.default: broadcast,
}
