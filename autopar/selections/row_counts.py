"""How many rows were selected, where a model computes with that number: ``total / rows.shape[0]``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import traced_value

aten = torch.ops.aten

_ARITHMETIC: dict[Any, tuple[Any, Any]] = {  # of numbers -> of a tensor and a number, of two tensors
    operator.mul: (aten.mul.Scalar, aten.mul.Tensor),
    operator.add: (aten.add.Scalar, aten.add.Tensor),
    operator.sub: (aten.sub.Scalar, aten.sub.Tensor),
    operator.truediv: (aten.div.Scalar, aten.div.Tensor),
}


def count_of(op: Builder, number: fx.Node, count: Callable[[Any], fx.Node]) -> fx.Node | None:
    """The number of a traced graph as a scalar tensor; None for one that is computed otherwise than here.

    ``count`` gives the number of rows for torch's name of a size.
    """
    if number.target is aten.sym_size.int:
        return count(traced_value(number))
    parts = [count_of(op, one, count) if isinstance(one, fx.Node) else one for one in number.args]
    if number.target is torch.sym_float:
        return parts[0]  # type: ignore[return-value]
    if number.target not in _ARITHMETIC or None in parts:
        return None
    with_number, with_tensor = _ARITHMETIC[number.target]
    left, right = parts
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return op(with_tensor, left, right)
    if isinstance(left, fx.Node):
        return op(with_number, left, right)
    return op(with_number, right, left) if number.target in (operator.mul, operator.add) else None


def type_of(target: Any, place: int | str) -> str:
    """The type of the argument of an operator at ``place``, or of that name."""
    arguments = target._schema.arguments
    found = arguments[place] if isinstance(place, int) else next(one for one in arguments if one.name == place)
    return str(found.type)
