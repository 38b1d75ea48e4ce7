"""What is made of all rows that a condition selects: sums, means, norms, losses, of all rows without the others.

Each function takes the copy of an operator on all rows (:mod:`autopar.selections.selected_rows`), whose result has no
dim of rows any more, and writes it so that rows that were not selected do not count. A mean over no row is nan, as
torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value
from autopar.ir.operator_facts import argument_names
from autopar.mesh import Mesh
from autopar.rules import call_of, rule_for
from autopar.rules.losses import ELEMENTWISE, MEAN, NONE, SUM
from autopar.selections import grids
from autopar.selections.grids import Grid

aten = torch.ops.aten
NO_SPREAD = -float("inf")

FILLS: Mapping[Any, float] = {  # what adds nothing to a reduction
    aten.linalg_vector_norm.default: 0, aten.logsumexp.default: NO_SPREAD, aten.prod.default: 1, aten.prod.dim_int: 1,
    aten.any.default: 0, aten.any.dim: 0, aten.all.default: 1, aten.all.dim: 1, aten.nansum.default: 0,
    aten.count_nonzero.default: 0, aten.count_nonzero.dim_IntList: 0,
}  # fmt: skip
LABELS = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}


@dataclass(frozen=True)
class AllRows:
    """The copy of an operator: ``dims`` has each of its operands that has a dim of rows, with that dim."""

    op: Builder
    copy: fx.Node
    grid: Grid
    dims: Mapping[fx.Node, int]

    def argument(self, position: int, default: Any = None) -> Any:
        name = argument_names(self.copy.target)[position]
        given = self.copy.args[position] if len(self.copy.args) > position else default
        return self.copy.kwargs.get(name, given)

    def keyword(self, name: str) -> Any:
        return self.copy.kwargs.get(name)

    @property
    def source(self) -> fx.Node:
        """The first operand, the only one of most reductions."""
        found = self.copy.all_input_nodes[0]
        assert isinstance(found, fx.Node)
        return found

    def filled(self, source: fx.Node, fill: float) -> fx.Node:
        """An operand with ``fill`` in place of the rows that were not selected."""
        return grids.filled(self.op, self.grid, source, self.dims[source], fill)

    def again(self, fills: Mapping[fx.Node, float]) -> fx.Node:
        """The same operator on filled operands."""
        new = {source: self.filled(source, fill) for source, fill in fills.items()}
        args: Any = fx.map_arg(self.copy.args, lambda node: new.get(node, node))
        kwargs: Any = fx.map_arg(self.copy.kwargs, lambda node: new.get(node, node))
        return self.op(self.copy.target, *args, **kwargs)


def reduced(rows: AllRows) -> fx.Node | None:
    """The result for the selected rows alone; None where nothing says how to leave out the others."""
    target = rows.copy.target
    if target in FILLS:
        order = rows.argument(1) if target is aten.linalg_vector_norm.default else None
        return None if order is not None and order <= 0 else rows.again({rows.source: FILLS[target]})
    if target in REDUCED:
        return REDUCED[target](rows)
    if target in ELEMENTWISE:
        return _elementwise_loss(rows)
    if target in LABELS:
        return _class_loss(rows)
    return _linear(rows)


def _linear(rows: AllRows) -> fx.Node | None:
    """What adds up over rows and is linear in them: sums, products of matrices."""
    rule = rule_for(rows.copy.target)
    if rule is None:
        return None
    factoring = rule(call_of(rows.copy, Mesh()))
    operands: list[fx.Node] = []
    fx.map_arg((rows.copy.args, rows.copy.kwargs), operands.append)
    places = {place: rows.dims[node] for place, node in enumerate(operands) if node in rows.dims}
    names = {factoring.inputs[place][dim] for place, dim in places.items()}
    linear = {place for group in factoring.linear for place in group} & set(places)
    if not linear or len(names) != 1:
        return None
    special = {*factoring.whole, *factoring.rewrites, *factoring.reduce}
    left = {factor for output in factoring.outputs for dim in output for factor in dim}
    (factors,) = names
    if len(factors) > 1 or special & set(factors) or left & set(factors):
        return None
    return rows.again({node: 0 for node in rows.dims if value(node).dtype.is_floating_point or len(operands) == 1})


def _mean(rows: AllRows) -> fx.Node | None:
    over_all = rows.copy.target is aten.mean.default
    dims, keepdim = (None, False) if over_all else (rows.argument(1), bool(rows.argument(2, False)))
    source, dtype = rows.source, rows.keyword("dtype")
    return _total_over_count(rows, source if dtype is None else rows.op.cast(source, dtype), dims, keepdim)


def _total_over_count(rows: AllRows, source: fx.Node, dims: Any, keepdim: bool, missing: float = 0) -> fx.Node:
    """The sum of ``source``, with rows where the operand has them, over the number of its elements less ``missing``."""
    op, shape, dim = rows.op, value(source).shape, rows.dims[rows.source]
    listed = sorted({int(d) % len(shape) for d in dims}) if dims else list(range(len(shape)))
    kept = grids.filled(op, rows.grid, source, dim, 0)
    total = op(aten.sum.dim_IntList, kept, listed, keepdim)
    return op(aten.div.Tensor, total, _number(rows, shape, listed, dim, missing))


def _number(rows: AllRows, shape: tuple[int, ...], dims: list[int], dim: int, missing: float = 0) -> fx.Node:
    """How many elements of the selected rows there are along ``dims``."""
    others = 1
    for one in dims:
        others *= shape[one] if one != dim else 1
    count = grids.count(rows.op, rows.grid)
    count = rows.op(aten.mul.Scalar, count, others) if others != 1 else count
    return rows.op(aten.clamp.default, rows.op(aten.sub.Scalar, count, missing), 0) if missing else count


def _variance(rows: AllRows) -> fx.Node | None:
    """``var`` and ``std`` over dims with the rows among them."""
    op, source, dims, target = rows.op, rows.source, rows.argument(1), rows.copy.target
    by_flag = target in (aten.var.dim, aten.std.dim)
    correction = int(rows.argument(2, True)) if by_flag else rows.keyword("correction")
    keepdim = bool(rows.argument(3, False) if by_flag else rows.keyword("keepdim"))
    mean = _total_over_count(rows, source, dims, True)
    squares = op(aten.square.default, op(aten.sub.Tensor, source, mean))
    found = _total_over_count(rows, squares, dims, keepdim, 1 if correction is None else correction)
    return found if target in (aten.var.correction, aten.var.dim) else op(aten.sqrt.default, found)


def _elementwise_loss(rows: AllRows) -> fx.Node | None:
    """A loss of each element, then the mean or the sum of those of the selected rows."""
    position = ELEMENTWISE[rows.copy.target]
    reduction = rows.argument(position, MEAN)
    if reduction == NONE:
        return None
    names = argument_names(rows.copy.target)
    settings: dict[str, Any] = {**dict(zip(names, rows.copy.args)), **rows.copy.kwargs, "reduction": NONE}
    tensors = [settings.pop(name) for name in names[:2]]
    each = rows.op(rows.copy.target, *tensors, **settings)
    rank = len(value(each).shape)
    dims = {dim + rank - len(value(source).shape) for source, dim in rows.dims.items()}
    if len(dims) != 1:
        return None
    (dim,) = dims
    total = rows.op(aten.sum.default, grids.filled(rows.op, rows.grid, each, dim, 0))
    if reduction == SUM:
        return total
    return rows.op(aten.div.Tensor, total, _number(rows, value(each).shape, list(range(rank)), dim))


def _class_loss(rows: AllRows) -> fx.Node | None:
    """cross_entropy, nll_loss: rows that were not selected get the label that is ignored."""
    scores, target = rows.argument(0), rows.argument(1)
    if rows.argument(3, MEAN) == NONE:
        return None
    if value(target).dtype.is_floating_point or [rows.dims.get(scores), rows.dims.get(target)] != [0, 0]:
        return None
    return rows.again({target: rows.argument(4, -100)})


REDUCED: dict[Any, Callable[[AllRows], fx.Node | None]] = {
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    **dict.fromkeys((aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim), _variance),
}
