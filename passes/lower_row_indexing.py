"""Write look-ups of rows by position, and writes under a mask, as operators in which a batch can be split.

An index of two tensors requires all of ``x``, although each row reads only itself (``gather``), or all rows read the
same (``index_select``). ``x[mask] = value`` becomes a choice for each element, and ``masked_scatter`` a choice between
an element and the one whose turn it is. Other indices stay.

before:
  x     = input x                              : f32[4,5,3]
  picks = input picks                          : i64[4]
  rows  = aten.arange(4)                       : i64[4]
  index = aten.index.Tensor(x, [rows, picks])  : f32[4,3]
  return index
after:
  x         = input x                             : f32[4,5,3]
  picks     = input picks                         : i64[4]
  remainder = aten.remainder.Scalar(picks, 5)     : i64[4]
  reshape   = aten.reshape(remainder, [4, 1, 1])  : i64[4,1,1]
  expand    = aten.expand(reshape, [4, 1, 3])     : i64[4,1,3]
  gather    = aten.gather(x, 1, expand)           : f32[4,1,3]
  reshape_1 = aten.reshape(gather, [4, 3])        : f32[4,3]
  return reshape_1
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import calls, graph_pass
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import operand, remove_unused, substitute

aten = torch.ops.aten


@graph_pass(when=calls(lambda target: target in LOWERED))
def lower_row_indexing(program: Program) -> Program:
    found = [node for node in program.graph.nodes if node.target in LOWERED]
    for node in found:
        new = LOWERED[node.target](node)
        if new is not None:
            substitute(node, new)
    remove_unused(program.graph)
    return program


def _index(node: fx.Node) -> fx.Node | None:
    """``x[arange(n), picks]``, which pairs rows with rows."""
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
    """``gather``: each row of ``source`` picks its own columns."""
    op, shape = Builder(before=node), value(source).shape
    width, rest = math.prod(value(picks).shape[1:]), shape[2:]
    counted = op(aten.remainder.Scalar, picks, shape[1])  # from the front: -1 is the last
    narrow = op(aten.reshape.default, counted, [shape[0], width, *[1] * len(rest)])
    wide = op(aten.expand.default, narrow, [shape[0], width, *rest])
    found = op(aten.gather.default, source, 1, wide)
    return op(aten.reshape.default, found, list(value(node).shape))


def _selected(node: fx.Node, source: fx.Node, picks: fx.Node) -> fx.Node:
    """``index_select``: all rows of ``source`` pick the same. Hugging Face looks up attention masks in this way."""
    op, shape, width = Builder(before=node), value(source).shape, math.prod(value(picks).shape)
    flat = op(aten.reshape.default, op(aten.remainder.Scalar, picks, shape[1]), [width])
    found = op(aten.index_select.default, source, 1, flat)
    return op(aten.reshape.default, found, list(value(node).shape))


def _counts_rows(node: fx.Node, rows: int) -> bool:
    """Whether ``node`` is arange(rows), as (rows) or (rows, 1, ...)."""
    shape = value(node).shape
    while node.target in (aten.reshape.default, aten.unsqueeze.default):
        node = operand(node)
    if shape[:1] != (rows,) or math.prod(shape) != rows:
        return False
    return (node.target, node.args) in ((aten.arange.default, (rows,)), (aten.arange.start, (0, rows)))


def _index_put(node: fx.Node) -> fx.Node | None:
    """``x[mask] = value``, one value for all that is written: element by element, where an index requires all of x."""
    source, slots = operand(node), node.args[1]
    assert isinstance(slots, (list, tuple))
    mask, written = slots[0], operand(node, 2)
    adds = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    if len(slots) != 1 or not isinstance(mask, fx.Node) or value(mask).dtype is not torch.bool or adds:
        return None
    rank, chosen = len(value(source).shape), len(value(mask).shape)
    shape = value(written).shape
    if len(shape) > rank - chosen + 1 or (len(shape) == rank - chosen + 1 and shape[0] != 1):
        return None  # a value for each place: how many there are, only the mask says
    op = Builder(before=node)
    row = op.reshape(written, *shape[1:]) if len(shape) > rank - chosen else written
    return op(aten.where.self, op.reshape(mask, *value(mask).shape, *[1] * (rank - chosen)), row, source)


def _masked_scatter(node: fx.Node) -> fx.Node:
    """The n-th place under the mask takes the n-th element of ``given``; the n-th row, where whole rows are masked."""
    source, mask, given = (operand(node, position) for position in range(3))
    op, shape = Builder(before=node), value(source).shape
    rows = _rows_of_mask(mask, shape)
    width = shape[-1] if rows is not None and math.prod(value(given).shape) % shape[-1] == 0 else 1
    marks = rows if rows is not None and width > 1 else op(aten.expand.default, mask, list(shape))
    places = math.prod(value(marks).shape)
    found = op(aten.reshape.default, given, [-1, width])
    counted = op(aten.cumsum.default, op.cast(op(aten.reshape.default, marks, [places]), torch.int64), 0)
    last = value(found).shape[0] - 1
    picks = op(aten.clamp.default, op(aten.sub.Tensor, counted, 1), 0, last)
    taken = op(aten.reshape.default, op(aten.index_select.default, found, 0, picks), list(shape))
    return op(aten.where.self, mask, taken, source)


def _rows_of_mask(mask: fx.Node, shape: tuple[int, ...]) -> fx.Node | None:
    """The mask as it is for each row: of size 1 in the last dim, then expanded."""
    node = mask
    while node.target is aten.expand.default and value(node).shape[-1] != 1:
        node = operand(node)
    return node if value(node).shape == (*shape[:-1], 1) else None


LOWERED: dict[Any, Any] = {
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.masked_scatter.default: _masked_scatter,
}
