"""Rows of which each rank has as many as arrive: no operator of a joint graph may say how many there are.

Forward and backward are recorded at the number of rows of a balanced load. torch writes sizes into the derivatives of
some operators (views, sums). Where they are those of ragged rows they become -1, which means what is left.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, set_values, values
from autopar.ir.operator_facts import is_pointwise
from autopar.mesh import Mesh
from autopar.operators.experts import EXPERT_LINEAR, EXPERT_OUTER
from autopar.operators.routing import COLUMNS, COLUMNS_BACKWARD, RECEIVED_IDS

aten = torch.ops.aten

DISPATCH, RETURN = comm.OPS.dispatch_rows.default, comm.OPS.return_rows.default  # none is started early yet
BEGIN = {DISPATCH, RECEIVED_IDS}
MADE = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
END = {RETURN, *MADE, EXPERT_OUTER, aten.index_put.default}  # what they return has its own rows
SIZED = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
TURNED = {aten.t.default, aten.transpose.int, aten.permute.default}
SAME = {
    EXPERT_LINEAR, COLUMNS, COLUMNS_BACKWARD, operator.getitem, aten.index.Tensor, aten.cat.default, aten.clone.default,
    aten._to_copy.default, aten.split.Tensor, aten.split_with_sizes.default, aten.constant_pad_nd.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten._softmax.default, aten._softmax_backward_data.default,
}  # fmt: skip
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.linear.default}
SUMS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}


def free_sizes(graph: fx.Graph, mesh: Mesh) -> None:
    """Mark the ragged dims of a joint graph, in place, and take their sizes out of all arguments.

    Raises InvariantError for an operator whose result has, or may have, a ragged dim elsewhere.
    """
    if not any(node.target is DISPATCH for node in graph.nodes):
        return
    found: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in END:
            continue
        ragged = {source: found[source] for source in node.all_input_nodes if source in found}
        if node.target in BEGIN:
            dim: int | None = 0
        elif ragged:
            dim = _Call(node, ragged, mesh).dim()
        else:
            continue
        if dim is not None:
            found[node] = dim
            _mark(node, dim)


def _mark(node: Node, dim: int) -> None:
    kinds = []
    for kind in values(node):
        dims, mine = list(kind.layout.dims), kind.layout.dims[dim]
        if not any(factor.ragged for factor in mine):
            dims[dim] = (replace(mine[0], ragged=True), *mine[1:])
        kinds.append(replace(kind, layout=replace(kind.layout, dims=tuple(dims))))
    set_values(node, *kinds)


class _Call:
    """One call with ragged operands."""

    def __init__(self, node: Node, ragged: dict[Node, int], mesh: Mesh) -> None:
        self.node, self.ragged, self.mesh = node, ragged, mesh

    def dim(self) -> int | None:
        """The ragged dim of the result; None where it has none."""
        target, (source, dim) = self.node.target, next(iter(self.ragged.items()))
        if target in comm.TARGETS or target in SAME:
            return self._same(dim)
        if target in SIZED:
            return self._sized(source, dim)
        if target in TURNED:
            return self._turned(source, dim)
        if target in PRODUCTS:
            return self._product(dim)
        if target in SUMS:
            return self._summed(source, dim)
        if target in (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims):
            return self._inserted(source, dim)
        if is_pointwise(target) or self._looks_pointwise(source):
            return self._broadcast()
        raise self._refused("no way is known in which it passes ragged rows on")

    def _refused(self, why: str) -> InvariantError:
        where = origin(self.node)
        return InvariantError(
            f"{self.node.name} = {self.node.target} ({where.module}; {where.source}) takes rows of experts, of which "
            f"each rank has as many as arrive: {why}\nLikely fix: another operator, or a line in autodiff/ragged.py"
        )

    def _shape(self, node: Node) -> tuple[int, ...]:
        return values(node)[0].layout.local_shape(self.mesh)

    def _same(self, dim: int) -> int:
        if any(dim != other for other in self.ragged.values()):
            raise self._refused("its operands have them in different dims")
        return dim

    def _sized(self, source: Node, dim: int) -> int:
        before, after, sizes = self._shape(source), self._shape(self.node), self.node.args[1]
        assert isinstance(sizes, (list, tuple))
        if dim or after[:1] != before[:1]:
            raise self._refused(f"it makes {list(after)} of {list(before)}")
        self.node.args = (self.node.args[0], [-1, *sizes[1:]], *self.node.args[2:])
        return 0

    def _turned(self, source: Node, dim: int) -> int:
        rank = len(self._shape(source))
        order = list(range(rank))
        if self.node.target is aten.permute.default:
            order = [int(d) % rank for d in self.node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            a, b = (int(d) % rank for d in (self.node.args[1:] or (0, 1)))  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return order.index(dim)

    def _product(self, dim: int) -> int | None:
        left: Any = self.node.args[1 if self.node.target is aten.addmm.default else 0]
        if self.ragged.get(left) == 0:
            return 0
        if all(dim == (1 if source is left else 0) for source, dim in self.ragged.items()):
            return None  # summed over the rows
        raise self._refused("it is a product with them as columns")

    def _summed(self, source: Node, dim: int) -> int | None:
        rank, dims, keep = len(self._shape(source)), self.node.args[1], (*self.node.args, False)[2]
        assert isinstance(dims, (list, tuple))
        gone = {int(d) % rank for d in dims} or set(range(rank))  # type: ignore[arg-type]
        if dim in gone:
            if self.node.target is aten.mean.dim:
                raise self._refused("it divides by their number")
            return None
        return dim if keep else dim - sum(d < dim for d in gone)

    def _inserted(self, source: Node, dim: int) -> int:
        before, after = len(self._shape(source)), len(self._shape(self.node))
        given: Any = self.node.args[1]
        changed = sorted(int(d) % max(before, after) for d in (given if isinstance(given, (list, tuple)) else [given]))
        if after > before:
            return dim + (changed[0] <= dim)
        return dim - sum(d < dim for d in changed)

    def _looks_pointwise(self, source: Node) -> bool:
        """Whether all its tensors, of one shape or broadcast, have the shape of the result, and no size is given."""
        shape = self._shape(self.node)
        arguments = getattr(getattr(self.node.target, "_schema", None), "arguments", ())
        sized = any("int[]" in str(argument.type) or "List[int]" in str(argument.type) for argument in arguments)
        return not sized and all(self._shape(x) in (shape, ()) for x in self.node.all_input_nodes)

    def _broadcast(self) -> int:
        rank = len(self._shape(self.node))
        dims = {rank - len(self._shape(source)) + dim for source, dim in self.ragged.items()}
        if len(dims) > 1:
            raise self._refused("its operands have them in different dims")
        (dim,) = dims
        for source in self.node.all_input_nodes:
            shape = self._shape(source)
            place = dim - (rank - len(shape))
            if source not in self.ragged and place >= 0 and shape[place] != 1:
                raise self._refused(f"{source.name} {list(shape)} has a fixed number of them")
        return dim
