"""The parts of a tensor along one dim as rows of a matrix, so that the parts of several tensors fit into one buffer.

It is written once as a list of views: ``op`` puts them into a graph (a :class:`~autopar.ir.builder.Builder`) or runs
them on tensors (:func:`run`). Only for contiguous parts; :mod:`autopar.communication.pieces` cuts any split for one
collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
Op = Callable[..., Any]  # (operator, *arguments) -> its result


def run(target: Any, *args: Any) -> Any:
    """Run an operator on tensors at once."""
    return target(*args)


def apart(op: Op, whole: Any, shape: Sequence[int], dim: int, ways: int) -> Any:
    """(ways, n): the part of each rank along ``dim`` in a row; the last is padded with zeros."""
    sizes = list(shape)
    part = -(-sizes[dim] // ways)
    if missing := part * ways - sizes[dim]:
        sizes[dim] += missing
        whole = op(aten.constant_pad_nd.default, whole, [0, 0] * (len(sizes) - 1 - dim) + [0, missing], 0.0)
    if dim:
        whole = op(aten.reshape.default, whole, [*sizes[:dim], ways, part, *sizes[dim + 1 :]])
        whole = op(aten.permute.default, whole, [dim, *(d for d in range(len(sizes) + 1) if d != dim)])
    return op(aten.reshape.default, whole, [ways, math.prod(sizes) // ways])


def together(op: Op, rows: Any, shape: Sequence[int], dim: int, ways: int) -> Any:
    """The inverse of :func:`apart`: the tensor of ``shape``, without padding.

    Where each part has one element along ``dim``, all of this is views, and the result has strides that not every
    kernel reads right (group norm takes its weight for contiguous): it is copied.
    """
    part = -(-shape[dim] // ways)
    padded = [part * ways if d == dim else size for d, size in enumerate(shape)]
    if dim:
        rows = op(aten.reshape.default, rows, [ways, *(part if d == dim else size for d, size in enumerate(shape))])
        rows = op(aten.permute.default, rows, [*range(1, dim + 1), 0, *range(dim + 1, len(shape) + 1)])
    whole = op(aten.reshape.default, rows, padded)
    if part == 1:
        whole = op(aten.clone.default, whole)
    return whole if padded[dim] == shape[dim] else op(aten.slice.Tensor, whole, dim, 0, shape[dim])
