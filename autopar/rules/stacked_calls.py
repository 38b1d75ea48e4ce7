"""One call in place of a call for each expert: of the stacked weights, for each row those of the expert that it chose.

The calls of all experts are followed together from their results to their operands. The rule of an operator tells
along which dims its operands have the rows. What is the same for all experts is used as it is; where a row meets a
weight of its expert, a product becomes ``autopar.expert_linear`` and a vector is looked up by the row's id.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value, values
from autopar.ir.operator_facts import is_pointwise, is_pure
from autopar.ir.rewrite import operand
from autopar.operators.experts import EXPERT_LINEAR
from autopar.rules.expert_terms import chosen_weight
from autopar.rules.row_by_row import MixesRows, row_dims

aten = torch.ops.aten
Calls = tuple[fx.Node, ...]  # the nodes of all experts that do the same
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
NORMS: dict[Any, tuple[int, ...]] = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
}  # the places of their weights
REPEAT = aten.repeat_interleave.self_int


class Unlike(Exception):
    """The calls of the experts differ in more than their weights, or do not treat each row alone."""


@dataclass
class Stacked:
    """Writes the calls of all experts as one, in front of a node.

    ``chosen``: the ids as the model has them; ``ids`` (N): those of each row, ``bounded`` where none is beyond the
    last expert. ``copies`` rows that follow each other are one row of the calls that are replaced.
    """

    op: Builder
    chosen: fx.Node
    ids: fx.Node
    bounded: bool
    copies: int
    made: dict[tuple[Calls, int | None], fx.Node] = field(default_factory=dict)
    alike: dict[Calls, bool] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return value(self.ids).shape[0]

    def rows(self, nodes: Calls, dim: int) -> fx.Node:
        """The results (..., N, ...) of all experts along ``dim``. Raises Unlike."""
        if (nodes, dim) not in self.made:
            self.made[nodes, dim] = self._rows(nodes, dim)
        return self.made[nodes, dim]

    def _rows(self, nodes: Calls, dim: int) -> fx.Node:
        if self._same(nodes):
            return self.op(REPEAT, nodes[0], self.copies, dim) if self.copies > 1 else nodes[0]
        weight = self._weight(nodes) if dim == 0 else None
        if weight is not None:
            return self.op.reshape(weight, self.count, *value(nodes[0]).shape[1:])
        if nodes[0].target is operator.getitem:
            index = nodes[0].args[1]
            assert isinstance(index, int)
            calls = tuple(operand(node) for node in nodes)
            if (calls, dim) not in self.made:
                self.made[calls, dim] = self._call(calls, index, dim)
            return self.op(operator.getitem, self.made[calls, dim], index)
        return self._call(nodes, 0, dim)

    def _weight(self, nodes: Calls) -> fx.Node | None:
        """The weights (T, k) of all choices, where each call gives those of one expert."""
        found = [pair for pair in map(chosen_weight, nodes) if pair is not None]
        weights = {weight for weight, _ in found}
        whole = value(self.chosen).shape[-1:] == (self.copies,)
        numbers = [choice.number for _, choice in found if whole and choice.ids is self.chosen]
        return weights.pop() if len(weights) == 1 and numbers == list(range(len(nodes))) else None

    def _same(self, nodes: Calls) -> bool:
        """Whether all nodes are one value, written once or several times."""
        if len(set(nodes)) == 1:
            return True
        if nodes not in self.alike:
            written_again = is_pure(nodes[0].target) and _same_form(nodes)
            self.alike[nodes] = written_again and all(map(self._same, _operands(nodes)))
        return self.alike[nodes]

    # ------------------------------------------------------------ one operator

    def _call(self, nodes: Calls, index: int, dim: int) -> fx.Node:
        first = nodes[0]
        if not _same_form(nodes):
            raise Unlike(f"{', '.join(node.name for node in nodes[:3])} differ")
        operands = _operands(nodes)
        try:
            dims = row_dims(first, index, dim)
        except MixesRows as problem:
            raise Unlike(f"{first.name}: {problem}") from None
        weights = {i for i, calls in enumerate(operands) if dims[i] is None and not self._same(calls)}
        if first.target in PRODUCTS and weights:
            return self._product(first, operands, dims, dim)
        given = [self._operand(calls, dims[i], i in weights, first, dim) for i, calls in enumerate(operands)]
        if weights and first.target in NORMS and not first.kwargs:
            return self._norm(first, given, weights)
        if weights and not (is_pointwise(first.target) and dim == 0):
            raise Unlike(f"{first.name}: an operator with weights that is neither a product nor pointwise")
        return self._again(first, given, index, dim)

    def _operand(self, calls: Calls, dim: int | None, is_weight: bool, user: fx.Node, at: int) -> fx.Node:
        if dim is not None:
            return self.rows(calls, dim)
        return self._looked_up(calls, len(value(user).shape)) if is_weight else calls[0]

    def _again(self, first: fx.Node, given: Sequence[fx.Node], index: int, dim: int) -> fx.Node:
        """``first`` with other operands."""
        left = iter(given)
        args, kwargs = fx.map_arg((first.args, first.kwargs), lambda _: next(left))
        if first.target in (aten.reshape.default, aten.expand.default):
            shape = list(values(first)[index].shape)
            shape[dim] = self.count
            return self.op(first.target, args[0], shape)
        given_by_name: dict[str, Any] = dict(kwargs)
        return self.op(first.target, *args, **given_by_name)

    def _product(self, first: fx.Node, operands: Sequence[Calls], dims: Sequence[int | None], dim: int) -> fx.Node:
        """``x @ w``, ``x @ w.T + b``, ``b + x @ w`` of rows x and weights of each expert."""
        added = first.target is aten.addmm.default
        at = 1 if added else 0  # where x is
        if first.kwargs or dims[at] is None or dims[at + 1] is not None or len(value(operands[at + 1][0]).shape) != 2:
            raise Unlike(f"{first.name}: a product of another form")
        weight = self._stack(operands[at + 1])
        if first.target is aten.linear.default:
            weight = self.op(aten.transpose.int, weight, 1, 2)
        inner, outer = value(weight).shape[1:]
        found = self.op(EXPERT_LINEAR, self._matrix(operands[at], dims[at], inner), weight, self.ids)
        for position in {0, 2} & set(range(len(operands))) - {at, at + 1}:
            if dims[position] is not None:
                raise Unlike(f"{first.name}: a bias of each row")
            bias = operands[position]
            found = self.op(aten.add.Tensor, found, bias[0] if self._same(bias) else self._looked_up(bias, 2))
        shape = list(value(first).shape)
        shape[dim] = self.count
        return self.op.reshape(found, *shape) if shape[-1] == outer else found

    def _matrix(self, nodes: Calls, dim: int | None, inner: int) -> fx.Node:
        """Rows (T, I) or (N, I) for a product, not repeated where the operator can do so itself."""
        assert dim is not None
        if any(size != 1 for place, size in enumerate(value(nodes[0]).shape[:-1]) if place != dim):
            raise Unlike(f"{nodes[0].name}: rows of more than one dim")
        rows = nodes[0] if self._same(nodes) else self.rows(nodes, dim)
        below = rows
        while below.target is aten.reshape.default:
            below = operand(below)
        if below.target is REPEAT and below.args[2:] == (0,) and value(below).shape[0] == self.count:
            rows = operand(below)
        return self.op.reshape(rows, torch.Size(value(rows).shape[:-1]).numel(), inner)

    def _norm(self, first: fx.Node, given: Sequence[fx.Node], weights: set[int]) -> fx.Node:
        """A norm, then the weight and the bias of each row's expert."""
        plain: list[Any] = [None if place in NORMS[first.target] else arg for place, arg in enumerate(first.args)]
        plain[0] = given[0]
        found = self.op(first.target, *plain)
        scale, *shift = given[1:]
        found = self.op(aten.mul.Tensor, found, scale)
        return self.op(aten.add.Tensor, found, *shift) if shift else found

    # ------------------------------------------------------------ weights

    def _stack(self, nodes: Calls) -> fx.Node:
        if (nodes, None) not in self.made:
            self.made[nodes, None] = self._stacked(nodes)
        return self.made[nodes, None]

    def _stacked(self, nodes: Calls) -> fx.Node:
        """The weights of all experts behind each other; what is done to each of them is done to their stack."""
        first = nodes[0]
        if len(set(nodes)) != len(nodes) or len({values(node) for node in nodes}) != 1:
            raise Unlike(f"{', '.join(node.name for node in nodes[:3])}: weights that differ in type, or are shared")
        if first.target in (aten.transpose.int, aten._to_copy.default) and _same_form(nodes):
            inner = self._stack(tuple(operand(node) for node in nodes))
            if first.target is aten._to_copy.default:
                return self.op.cast(inner, value(first).dtype)
            rank = len(value(first).shape)
            return self.op(aten.transpose.int, inner, *(int(dim) % rank + 1 for dim in first.args[1:]))  # type: ignore[arg-type]
        return self.op(aten.stack.default, list(nodes))

    def _looked_up(self, nodes: Calls, rank: int) -> fx.Node:
        """The weight (N, ...) of each row's expert, to be broadcast to a tensor of ``rank`` dims."""
        stack, shape = self._stack(nodes), value(nodes[0]).shape
        if len(shape) == rank and shape[0] == 1:
            shape = shape[1:]
        if len(shape) >= rank:
            raise Unlike(f"{nodes[0].name}: a weight with as many dims as the rows")
        ids = self.ids if self.bounded else self.op(aten.clamp.default, self.ids, 0, len(nodes) - 1)
        found = self.op(aten.index.Tensor, stack, [ids])
        return self.op.reshape(found, self.count, *[1] * (rank - 1 - len(shape)), *shape)


def _operands(nodes: Calls) -> list[Calls]:
    found: list[list[fx.Node]] = []
    for node in nodes:
        own: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), own.append)
        found.append(own)
    return list(zip(*found))


def _same_form(nodes: Calls) -> bool:
    """Whether all are calls of one operator that differ in their operands only, with results of one type."""

    def form(node: fx.Node) -> Any:
        return node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda _: "a node"), values(node)

    first: Any = form(nodes[0])
    return first[0] == "call_function" and all(form(node) == first for node in nodes[1:])
