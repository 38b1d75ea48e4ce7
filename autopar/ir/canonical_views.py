"""Canonical forms of operators that only rearrange: all sizes written out, bounds from the front, nothing undone.

Each function takes a node and returns its canonical form: another node, a new one in front of it, or None where the
node is canonical already.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value, values
from autopar.ir.operator_facts import UNSAFE_SPLITS
from autopar.ir.rewrite import operand

aten = torch.ops.aten


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def same_type(node: fx.Node, source: fx.Node) -> bool:
    return value(node).shape == value(source).shape and value(node).dtype == value(source).dtype


def reshape(node: fx.Node) -> fx.Node | None:
    """One reshape with all sizes; reshape after reshape is one reshape."""
    source, shape = operand(node), list(value(node).shape)
    while source.target is aten.reshape.default and len(source.users) == 1:
        source = operand(source)
    if list(value(source).shape) == shape:
        return source
    if node.target is aten.reshape.default and node.args == (source, shape):
        return None
    return Builder(before=node)(aten.reshape.default, source, shape)


def expand(node: fx.Node) -> fx.Node | None:
    source, shape = operand(node), list(value(node).shape)
    if list(value(source).shape) == shape:
        return source
    if node.target is aten.expand.default and node.args == (source, shape):
        return None
    return Builder(before=node)(aten.expand.default, source, shape)


def keeps_shape(node: fx.Node) -> fx.Node | None:
    """Operators that do nothing if the shape stays the same."""
    return operand(node) if same_type(node, operand(node)) else None


def pad(node: fx.Node) -> fx.Node | None:
    padding = node.args[1]
    assert isinstance(padding, (list, tuple))
    return None if any(padding) else operand(node)


def slice_(node: fx.Node) -> fx.Node | None:
    """``slice(x, dim, start, end, step)`` with 0 <= dim and 0 <= start <= end <= size."""
    source = operand(node)
    shape = value(source).shape
    dim = argument(node, 1, "dim", 0) % len(shape)
    step = argument(node, 4, "step", 1)
    start, end, _ = slice(argument(node, 2, "start", None), argument(node, 3, "end", None)).indices(shape[dim])
    if (start, end, step) == (0, shape[dim], 1):
        return source
    args = (source, dim, start, max(start, end), step)
    return None if node.args == args else Builder(before=node)(aten.slice.Tensor, *args)


def permute(node: fx.Node) -> fx.Node | None:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return operand(node) if [int(d) % len(order) for d in order] == list(range(len(order))) else None  # type: ignore[arg-type]


def transpose(node: fx.Node) -> fx.Node | None:
    source, rank = operand(node), len(value(node).shape)
    if rank < 2:
        return source
    if node.target is aten.t.default:
        return Builder(before=node)(aten.transpose.int, source, 0, 1)
    return source if int(node.args[1]) % rank == int(node.args[2]) % rank else None  # type: ignore[arg-type]


def pieces(node: fx.Node) -> fx.Node | None:
    """``cat`` without empty pieces; the ``cat`` of one piece is that piece."""
    given, dim = node.args[0], argument(node, 1, "dim", 0)
    assert isinstance(given, (list, tuple))
    filled = [piece for piece in given if isinstance(piece, fx.Node) and 0 not in value(piece).shape]
    if len(filled) == 1 and same_type(node, filled[0]):
        return filled[0]
    if not filled or len(filled) == len(given):
        return None
    return Builder(before=node)(aten.cat.default, filled, dim)


def split(node: fx.Node) -> None:
    """The parts of an unsafe split are parts like others: nothing is written in a functional graph."""
    node.target = UNSAFE_SPLITS[node.target]


def item(node: fx.Node) -> fx.Node | None:
    """The only piece of a split is the whole; tensors that are broadcast together are expanded each by itself."""
    parent = operand(node)
    if parent.target is aten.broadcast_tensors.default:
        given, shape = parent.args[0], list(value(node).shape)
        assert isinstance(given, (list, tuple)) and isinstance(node.args[1], int)
        source = given[node.args[1]]
        assert isinstance(source, fx.Node)
        return (
            source if list(value(source).shape) == shape else Builder(before=node)(aten.expand.default, source, shape)
        )
    whole = parent.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
    return operand(parent) if whole and len(values(parent)) == 1 else None


REWRITES: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.view_as.default: reshape,
    aten.reshape.default: reshape,
    aten.reshape_as.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    aten.broadcast_to.default: expand,
    aten.repeat.default: keeps_shape,
    aten.squeeze.default: keeps_shape,
    aten.squeeze.dim: keeps_shape,
    aten.squeeze.dims: keeps_shape,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.slice.Tensor: slice_,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.cat.default: pieces,
    **dict.fromkeys(UNSAFE_SPLITS, split),
    operator.getitem: item,
}
