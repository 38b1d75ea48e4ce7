"""Products of rows, factor by factor: with other rows, with one matrix for each expert, with one matrix for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.experts.digits import Unaligned
from autopar.experts.rows import Arranger, Lead, Rows
from autopar.operators.experts import EXPERT_LINEAR

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """Rows whose further dims are the factors ``names`` of a product; dims of size 1 aside."""

    rows: Rows
    names: list[str]

    @property
    def has_rows(self) -> bool:
        return self.rows.lead in (Lead.PAIR, Lead.TOKEN)


def multiplied(
    arranger: Arranger, operands: Sequence[Operand], wanted: Sequence[str], sizes: Mapping[str, int]
) -> tuple[Rows, list[tuple[fx.Node, fx.Node]]]:
    """The rows of a product with the factors ``wanted``, the others summed; each expert_linear made, with its weights.

    Rows come first, matrices next, and numbers for whole rows, such as routing weights, last.
    """
    first = [operand for operand in operands if operand.has_rows and operand.names]
    last = [operand for operand in operands if operand.has_rows and not operand.names]
    queue = [*first, *(operand for operand in operands if not operand.has_rows), *last]
    made: list[tuple[fx.Node, fx.Node]] = []
    found, *rest = queue
    for number, operand in enumerate(rest):
        later = {name for other in rest[number + 1 :] for name in other.names}
        kept = {*wanted, *later}
        product = _by_matrix(arranger, found, operand, kept, sizes, made)
        found = product or _row_by_row(arranger, found, operand, kept, sizes)
    found = _without(arranger, found, set(wanted), sizes)
    return arranger.reordered(found.rows, found.names, sizes, wanted), made


def _by_matrix(
    arranger: Arranger,
    left: Operand,
    right: Operand,
    kept: set[str],
    sizes: Mapping[str, int],
    made: list[tuple[fx.Node, fx.Node]],
) -> Operand | None:
    """Rows times matrices (I, O); None for a product of another form."""
    inner = [name for name in left.names if name in right.names and name not in kept]
    outer = [name for name in right.names if name not in left.names]
    if (
        not left.has_rows
        or right.has_rows
        or not inner
        or not outer
        or inner != left.names
        or len(inner + outer) != len(right.names)
    ):
        return None
    lead = left.rows.lead
    rows = arranger.shaped(left.rows.node, *arranger.length(lead), math.prod(sizes[name] for name in inner))
    matrices = arranger.reordered(right.rows, right.names, sizes, inner + outer)
    shape = [math.prod(sizes[name] for name in names) for names in (inner, outer)]
    weight = arranger.shaped(matrices.node, *arranger.length(right.rows.lead), *shape)
    if right.rows.lead is Lead.EXPERT:
        found, lead = arranger.op(EXPERT_LINEAR, rows, weight, arranger.ids), Lead.PAIR
        made.append((found, weight))
    else:
        found = arranger.op(aten.mm.default, rows, weight)
    further = tuple(sizes[name] for name in outer)
    return Operand(Rows(arranger.shaped(found, *arranger.length(lead), *further), lead, further), outer)


def _row_by_row(arranger: Arranger, left: Operand, right: Operand, kept: set[str], sizes: Mapping[str, int]) -> Operand:
    """Elementwise, then summed. Raises Unaligned rather than pick a matrix for each row."""
    if any(operand.rows.lead is Lead.EXPERT and len(operand.names) > 1 for operand in (left, right)):
        raise Unaligned("it multiplies the matrices of experts with something else than rows")
    names = [*left.names, *(name for name in right.names if name not in left.names)]
    pairs = left.rows.lead is not right.rows.lead or left.rows.lead is Lead.EXPERT
    sides = []
    for operand in (left, right):
        rows = arranger.pairs(operand.rows) if pairs else operand.rows
        own = [name for name in names if name in operand.names]
        rows = arranger.reordered(rows, operand.names, sizes, own)
        lined = (sizes[name] if name in own else 1 for name in names)
        sides.append(arranger.shaped(rows.node, *arranger.length(rows.lead), *lined))
    lead = Lead.PAIR if pairs else left.rows.lead
    product = arranger.product(*sides)
    return _without(arranger, Operand(Rows(product, lead, tuple(sizes[n] for n in names)), names), kept, sizes)


def _without(arranger: Arranger, operand: Operand, kept: set[str], sizes: Mapping[str, int]) -> Operand:
    """The sum over all factors but those ``kept``."""
    gone = [i for i, name in enumerate(operand.names) if name not in kept]
    if not gone:
        return operand
    shift = len(arranger.length(operand.rows.lead))
    found = arranger.op(aten.sum.dim_IntList, operand.rows.node, [shift + i for i in gone])
    names = [name for name in operand.names if name in kept]
    return Operand(Rows(found, operand.rows.lead, tuple(sizes[name] for name in names)), names)
