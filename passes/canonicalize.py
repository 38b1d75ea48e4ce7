"""Rewrites every operator to one form and drops those that do nothing, so that later passes meet fewer cases.

before:
  x      = input x                                                        : f32[4,16,8]
  cast   = aten._to_copy(x, dtype=f32)                                    : f32[4,16,8]
  view   = aten.view(cast, [64, -1])                                      : f32[64,8]
  same   = aten.slice.Tensor(view, 0, 0, 9223372036854775807)             : f32[64,8]
  part   = aten.slice.Tensor(same, -1, -4, 9223372036854775807)           : f32[64,4]
  return part
after:
  x         = input x                                 : f32[4,16,8]
  reshape   = aten.reshape(x, [64, 8])                : f32[64,8]
  slice_1   = aten.slice.Tensor(reshape, 1, 4, 8, 1)  : f32[64,4]
  return slice_1
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, is_flat, is_functional, placeholders_match_inputs
from autopar.ir.layout import Layout
from autopar.ir.node import value, values
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, insert_before, operand, remove_unused, substitute

aten = torch.ops.aten

Rewrite = Callable[[fx.Node], fx.Node | None]  # None: it is in its form already


@graph_pass(ensures=(is_flat, is_functional, every_value_has_a_layout, placeholders_match_inputs))
def canonicalize(program: Program) -> Program:
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_assertion(node):
            program.graph.erase_node(node)
            continue
        rewrite = REWRITES.get(node.target)
        new = rewrite(node) if rewrite else None
        if new is not None:
            substitute(node, new)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _is_assertion(node: fx.Node) -> bool:
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    return name.startswith(("aten::_assert", "aten::sym_constrain")) and not node.users


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    return value(node).shape == value(source).shape and value(node).dtype == value(source).dtype


def nothing(node: fx.Node) -> fx.Node:
    return operand(node)


def copy(node: fx.Node) -> fx.Node | None:
    if any(user.target is aten.view_as_complex.default for user in node.users):
        return None  # it needs the strides of a copy
    return operand(node)


def detach(node: fx.Node) -> fx.Node | None:
    return None if value(operand(node)).requires_grad else operand(node)


def dropout(node: fx.Node) -> fx.Node | None:
    _, probability, training = node.args
    return None if probability and training else operand(node)


def cast(node: fx.Node) -> fx.Node | None:
    """``_to_copy(x, dtype)`` or nothing; f32(x: bf16) cast back to bf16 is x."""
    source, dtype = operand(node), value(node).dtype
    if value(source).dtype == dtype:
        return source
    if source.target is aten._to_copy.default:
        first, wide = operand(source), value(source).dtype
        if value(first).dtype == dtype and dtype.is_floating_point and torch.promote_types(dtype, wide) == wide:
            return first
    if node.target is aten._to_copy.default and node.kwargs == {"dtype": dtype}:
        return None
    return insert_before(node, aten._to_copy.default, (source,), {"dtype": dtype})


def reshape(node: fx.Node) -> fx.Node | None:
    """One reshape with all sizes; reshape after reshape is one reshape."""
    source, shape = operand(node), list(value(node).shape)
    while source.target is aten.reshape.default and len(source.users) == 1:
        source = operand(source)
    if list(value(source).shape) == shape:
        return source
    if node.target is aten.reshape.default and node.args == (source, shape):
        return None
    return insert_before(node, aten.reshape.default, (source, shape))


def expand(node: fx.Node) -> fx.Node | None:
    source, shape = operand(node), list(value(node).shape)
    if list(value(source).shape) == shape:
        return source
    if node.target is aten.expand.default and node.args == (source, shape):
        return None
    return insert_before(node, aten.expand.default, (source, shape))


def keeps_shape(node: fx.Node) -> fx.Node | None:
    """Operators that do nothing if the shape stays."""
    return operand(node) if _same_type(node, operand(node)) else None


def pad(node: fx.Node) -> fx.Node | None:
    padding = node.args[1]
    assert isinstance(padding, (list, tuple))
    return None if any(padding) else operand(node)


def slice_(node: fx.Node) -> fx.Node | None:
    """``slice(x, dim, start, end, step)`` with 0 <= dim and 0 <= start <= end <= size."""
    source = operand(node)
    shape = value(source).shape
    dim = _argument(node, 1, "dim", 0) % len(shape)
    step = _argument(node, 4, "step", 1)
    start, end, _ = slice(_argument(node, 2, "start", None), _argument(node, 3, "end", None)).indices(shape[dim])
    if (start, end, step) == (0, shape[dim], 1):
        return source
    args = (source, dim, start, max(start, end), step)
    return None if node.args == args else insert_before(node, aten.slice.Tensor, args)


def permute(node: fx.Node) -> fx.Node | None:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return operand(node) if [int(d) % len(order) for d in order] == list(range(len(order))) else None  # type: ignore[arg-type]


def transpose(node: fx.Node) -> fx.Node | None:
    source, rank = operand(node), len(value(node).shape)
    if rank < 2:
        return source
    if node.target is aten.t.default:
        return insert_before(node, aten.transpose.int, (source, 0, 1))
    return source if int(node.args[1]) % rank == int(node.args[2]) % rank else None  # type: ignore[arg-type]


def neutral(number: float) -> Rewrite:
    """x + 0, x * 1: nothing, where it does not promote the type."""

    def drop(node: fx.Node) -> fx.Node | None:
        source, other = node.args[:2]
        if isinstance(other, (int, float)) and other == number and isinstance(source, fx.Node):
            return keeps_shape(node)
        return None

    return drop


def sum_of(node: fx.Node) -> fx.Node | None:
    """alpha=1 is not written."""
    if node.kwargs.get("alpha") == 1:
        node.kwargs = {}
    return neutral(0)(node)


def index_put(node: fx.Node) -> fx.Node | None:
    """``x[mask] = number``: element by element, where an index would need all of x."""
    source, slots = operand(node), node.args[1]
    assert isinstance(slots, (list, tuple))
    mask, written = slots[0], operand(node, 2)
    alone = len(slots) == 1 and isinstance(mask, fx.Node) and value(mask).dtype is torch.bool
    if not alone or value(written).shape not in ((), (1,)) or _argument(node, 3, "accumulate", False):
        return None
    assert isinstance(mask, fx.Node)
    place, shape = value(mask), (*value(mask).shape, *[1] * (len(value(source).shape) - len(value(mask).shape)))
    if shape != place.shape:
        mask = insert_before(
            node, aten.reshape.default, (mask, list(shape)), {}, replace(place, layout=Layout.whole(shape))
        )
    if value(written).shape:
        written = insert_before(
            node, aten.reshape.default, (written, []), {}, replace(value(written), layout=Layout.whole(()))
        )
    return insert_before(node, aten.where.self, (mask, written, source))


def pieces(node: fx.Node) -> fx.Node | None:
    """``cat`` without pieces that hold nothing; of one piece it is that piece."""
    given, dim = node.args[0], _argument(node, 1, "dim", 0)
    assert isinstance(given, (list, tuple))
    filled = [piece for piece in given if isinstance(piece, fx.Node) and 0 not in value(piece).shape]
    if len(filled) == 1 and _same_type(node, filled[0]):
        return filled[0]
    if not filled or len(filled) == len(given):
        return None
    return insert_before(node, aten.cat.default, (filled, dim))


def index(node: fx.Node) -> fx.Node | None:
    """``x[arange(n), picks]``, which pairs rows with rows, in a form in which a batch can be split."""
    source, indices = operand(node), node.args[1]
    assert isinstance(indices, (list, tuple))
    rows, picks = indices if len(indices) == 2 else (None, None)
    if not isinstance(rows, fx.Node) or not isinstance(picks, fx.Node) or value(picks).dtype is torch.bool:
        return None
    shape, chosen, counted = value(source).shape, value(picks).shape, value(rows).shape
    if not _counts_rows(rows, shape[0]):
        return None
    if len(counted) == len(chosen) <= 2 and value(node).shape == chosen + shape[2:]:
        return _gathered(node, source, picks)
    if math.prod(chosen) == math.prod(value(node).shape[1 : len(counted)]) and chosen[:1] in ((), (1,)):
        return _selected(node, source, picks)
    return None


def _gathered(node: fx.Node, source: fx.Node, picks: fx.Node) -> fx.Node:
    """Each row of ``source`` picks its own: ``gather``."""
    shape, chosen = value(source).shape, value(picks).shape
    width, rest = math.prod(chosen[1:]), shape[2:]
    narrow = _shaped(node, aten.reshape.default, _counted(node, picks, shape[1]), [shape[0], width, *[1] * len(rest)])
    wide = _shaped(node, aten.expand.default, narrow, [shape[0], width, *rest])
    kind = replace(value(node), layout=Layout.whole((shape[0], width, *rest)))
    found = insert_before(node, aten.gather.default, (source, 1, wide), {}, kind)
    return insert_before(node, aten.reshape.default, (found, list(value(node).shape)))


def _selected(node: fx.Node, source: fx.Node, picks: fx.Node) -> fx.Node:
    """All rows of ``source`` pick the same: ``index_select``. Hugging Face looks up attention masks in this way."""
    shape, width = value(source).shape, math.prod(value(picks).shape)
    flat = _shaped(node, aten.reshape.default, _counted(node, picks, shape[1]), [width])
    kind = replace(value(node), layout=Layout.whole((shape[0], width, *shape[2:])))
    found = insert_before(node, aten.index_select.default, (source, 1, flat), {}, kind)
    return insert_before(node, aten.reshape.default, (found, list(value(node).shape)))


def _counted(node: fx.Node, picks: fx.Node, length: int) -> fx.Node:
    """``picks`` from the front: -1 is the last."""
    kind = replace(value(picks), layout=Layout.whole(value(picks).shape))
    return insert_before(node, aten.remainder.Scalar, (picks, length), {}, kind)


def _shaped(node: fx.Node, target: Any, source: fx.Node, shape: list[int]) -> fx.Node:
    return insert_before(node, target, (source, shape), {}, replace(value(source), layout=Layout.whole(shape)))


def _counts_rows(node: fx.Node, rows: int) -> bool:
    """Whether ``node`` is arange(rows), as (rows) or (rows, 1, ...)."""
    shape = value(node).shape
    while node.target in (aten.reshape.default, aten.unsqueeze.default, aten.view.default):
        node = operand(node)
    if shape[:1] != (rows,) or math.prod(shape) != rows:
        return False
    return (node.target, node.args) in ((aten.arange.default, (rows,)), (aten.arange.start, (0, rows)))


def item(node: fx.Node) -> fx.Node | None:
    """The only piece of a split is the whole."""
    parent = operand(node)
    whole = parent.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
    return operand(parent) if whole and len(values(parent)) == 1 else None


def attention(node: fx.Node) -> fx.Node | None:
    """Mask, dropout and causality by position; scale and enable_gqa by name."""
    rest = dict(node.kwargs)
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = dict(zip(defaults, node.args[3:]))
    node.args = (*node.args[:3], *(given.get(name, rest.pop(name, default)) for name, default in defaults.items()))
    node.kwargs = {name: setting for name, setting in rest.items() if (name, setting) != ("enable_gqa", False)}
    return None


def dense_gradient(node: fx.Node) -> None:
    """``embedding(..., sparse=True)``: gradients are reduced and split as dense tensors, of the same numbers."""
    node.args = node.args[:4]
    node.kwargs = {name: setting for name, setting in node.kwargs.items() if name != "sparse"}


def created(fill: float | None) -> Rewrite:
    """``x.new_zeros(shape)`` takes only its dtype from x, so it must not wait for x, nor want it whole."""

    def rewrite(node: fx.Node) -> fx.Node:
        number = node.args[2] if fill is None else fill
        arguments = (list(value(node).shape), number)
        kind = {"dtype": value(node).dtype, "device": torch.device("cpu")}  # emitted as the device of the rank
        return insert_before(node, aten.full.default, arguments, kind)

    return rewrite


def renamed(target: Any) -> Rewrite:
    return lambda node: insert_before(node, target, node.args, node.kwargs)


REWRITES: dict[Any, Rewrite] = {
    aten.alias.default: nothing,
    aten.lift_fresh_copy.default: nothing,
    aten.lift_fresh.default: nothing,
    aten.contiguous.default: nothing,
    aten.clone.default: copy,
    aten.detach.default: detach,
    aten.new_empty.default: created(0),
    aten.new_zeros.default: created(0),
    aten.new_ones.default: created(1),
    aten.new_full.default: created(None),
    aten.dropout.default: dropout,
    aten.feature_dropout.default: dropout,
    aten._to_copy.default: cast,
    aten.to.dtype: cast,
    aten.to.dtype_layout: cast,
    aten.to.device: cast,
    aten.to.other: cast,
    aten.type_as.default: cast,
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
    aten.add.Tensor: sum_of,
    aten.sub.Tensor: sum_of,
    aten.mul.Tensor: neutral(1),
    aten.div.Tensor: neutral(1),
    aten.cat.default: pieces,
    aten.concat.default: renamed(aten.cat.default),
    aten.index.Tensor: index,
    aten.index_put.default: index_put,
    aten.embedding.default: dense_gradient,
    aten.scaled_dot_product_attention.default: attention,
    aten.__and__.Tensor: renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: renamed(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: renamed(aten.bitwise_xor.Tensor),
    operator.getitem: item,
}
