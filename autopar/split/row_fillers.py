"""What copies of rows are replaced by, so that they add nothing where an operator combines rows.

* In what an operator is linear in, by zeros: sums, products, means (which then count more rows than there are).
* In labels, by the number of those that do not count.
* A loss of elements has no such value: it is written as the losses of all elements, and their sum or mean.
* A maximum, or whether any row is true, is the same with copies as without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from autopar import operators
from autopar.ir.builder import Builder
from autopar.ir.layout import Split
from autopar.ir.node import value
from autopar.ir.operator_facts import argument_names
from autopar.ir.rewrite import substitute
from autopar.rules.factoring import Call, Factoring, Strategy
from autopar.rules.losses import ELEMENTWISE, MEAN, NONE
from autopar.rules.reductions import share_of_mean

aten = torch.ops.aten

ALIKE = frozenset({
    aten.amax.default, aten.amin.default, aten.max.default, aten.min.default,
    aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
})  # fmt: skip
NORMS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar)
COUNTS = (aten.nansum.default, aten.count_nonzero.dim_IntList, aten.count_nonzero.default)
PRODUCTS = (aten.prod.default, aten.prod.dim_int)
BY_FIRST: Mapping[Any, float | int] = {**dict.fromkeys((*NORMS, *COUNTS), 0), **dict.fromkeys(PRODUCTS, 1)}
BY_LABEL = (operators.cross_entropy_sums, aten.nll_loss_nd.default, aten.cross_entropy_loss.default)
IGNORED = -100


@dataclass(frozen=True)
class Fillers:
    """What copies are replaced by in one call.

    Attributes:
        values: number of an operand -> what stands in place of its copies.
        reduces: whether the call combines rows.
        averages: whether it divides by their number, copies counted too.
    """

    values: Mapping[int, float | int] = field(default_factory=dict)
    reduces: bool = False
    averages: bool = False

    def finish(self, node: fx.Node, growth: Fraction) -> None:
        """Let a mean be one over rows alone; ``growth``: rows with copies to rows."""
        if not self.averages:
            return
        users = list(node.users)
        counted = Builder(after=node)(aten.mul.Tensor, node, float(growth))
        for user in users:
            user.replace_input_with(node, counted)


def fillers_of(call: Call, factoring: Factoring, strategy: Strategy) -> Fillers | None:
    """What copies are replaced by in ``call``, of which each part does some rows; None where nothing would do."""
    kept = [isinstance(placement, Split) for placement in strategy.outputs]
    if all(kept):
        return Fillers()
    if any(kept) or strategy.part is None:
        return None
    if call.target in ALIKE:
        return Fillers(reduces=True)
    rows = {number for number, placement in enumerate(strategy.inputs) if isinstance(placement, Split)}
    averages = factoring.rewrites.get(strategy.part.factor) is share_of_mean
    values = _values(call, factoring, rows)
    return Fillers(values, reduces=True, averages=averages) if values and rows.issuperset(values) else None


def _values(call: Call, factoring: Factoring, rows: set[int]) -> Mapping[int, float | int]:
    """:attr:`Fillers.values` of a call that combines the ``rows`` of these operands."""
    if call.target in BY_FIRST:
        return {0: BY_FIRST[call.target]}
    if call.target is aten.logsumexp.default:
        return {0: torch.finfo(value(call.operands[0]).dtype).min}
    if call.target in BY_LABEL:
        chances = len(call.inputs[0]) == len(call.inputs[1])
        return {1: 0 if chances else _ignored(call)}
    group = next((group & rows for group in factoring.linear if group & rows), ())
    return dict.fromkeys(group, 0)


def _ignored(call: Call) -> int:
    place = argument_names(call.target).index("ignore_index") if call.target in BY_LABEL[1:] else 3
    return int(call.argument(place, "ignore_index", IGNORED))


def write_out_losses(graph: fx.Graph) -> None:
    """Write means and sums of losses of elements as such: the losses of all elements, and their mean or sum."""
    for node in list(graph.nodes):
        position = ELEMENTWISE.get(node.target)
        if position is None:
            continue
        name = argument_names(node.target)[position]
        args, named = list(node.args), dict[str, Any](node.kwargs)
        reduction = args[position] if position < len(args) else named.get(name, MEAN)
        if reduction == NONE:
            continue
        if position < len(args):
            args[position] = NONE
        else:
            named[name] = NONE
        op = Builder(before=node)
        losses = op(node.target, *args, **named)
        substitute(node, op(aten.mean.default if reduction == MEAN else aten.sum.default, losses))
