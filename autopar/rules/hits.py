"""Conditions "this row, and its expert is hit", where the row alone tells that its expert is hit.

and(mask[3], (mask.sum((1, 2)) > 0)[3])             mask is nowhere negative
and(chosen == 3, (chosen == 3).any())
and(mask, mask.any())
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from autopar.ir.node import value
from autopar.ir.rewrite import operand
from autopar.rules.choices import At, Place, behind_views, choice_of

aten = torch.ops.aten
SUMS = {aten.sum.dim_IntList, aten.any.dim, aten.any.dims, aten.amax.default}
NEVER_NEGATIVE = {aten.one_hot.default}


class NotImplied(Exception):
    """Rows are selected by another condition than the one of the branch."""


def without_hits(condition: fx.Node) -> fx.Node:
    """The condition of rows alone, where that implies what is asked of their expert; else ``condition``.

    Raises NotImplied where the one who asks (by a flag of shape (1,)) needs it to be implied.
    """
    if condition.target is not aten.logical_and.default:
        return condition
    rows, hit = operand(condition, 0), operand(condition, 1)
    if value(hit).shape == (1,) and hit.target is aten.reshape.default:
        if not _is_any_of(rows, operand(hit)):
            raise NotImplied
        return without_hits(rows)
    if value(hit).shape == () and (_of_one_table(rows, hit) or _of_ids(rows, hit)):
        return rows
    return condition


def _is_any_of(rows: fx.Node, hit: fx.Node) -> bool:
    """``hit`` asks whether any element of the condition ``rows`` is true."""
    if hit.target is not aten.any.default:
        return False
    everywhere = [list(range(len(value(node).shape))) for node in (operand(hit), rows)]
    base, places = behind_views(operand(hit), everywhere[0])
    found, own = behind_views(rows, everywhere[1])
    fixed = [[place if isinstance(place, At) else None for place in some] for some in (places, own)]
    return (base is found and fixed[0] == fixed[1]) or _of_ids(rows, hit)


def _of_ids(rows: fx.Node, hit: fx.Node) -> bool:
    """``hit`` asks whether any of the ids is the number to which ``rows`` compares them."""
    if hit.target is not aten.any.default:
        return False
    all_of_them, own = (
        choice_of(operand(node) if node.target is aten.any.dim else node) for node in (operand(hit), rows)
    )
    if own is None or all_of_them is None or own.number != all_of_them.number:
        return False
    return own.ids is all_of_them.ids


def _of_one_table(rows: fx.Node, hit: fx.Node) -> bool:
    """``hit`` asks whether a table has anything but zeros for an expert, and ``rows`` is its part for that expert."""
    table, wanted = behind_views(hit, [])
    if table.target not in SUMS:
        return False
    while table.target in SUMS:
        table, wanted = behind_views(*_before_sum(table, wanted))
    found, own = behind_views(rows, list(range(len(value(rows).shape))))
    fixed = [[place if isinstance(place, At) else None for place in some] for some in (wanted, own)]
    positive = value(table).dtype is torch.bool or table.target in NEVER_NEGATIVE
    return table is found and positive and fixed[0] == fixed[1] and any(fixed[0])


def _before_sum(table: fx.Node, places: Sequence[Place]) -> tuple[fx.Node, list[Place]]:
    """The tensor that ``table`` sums over some dims, and the places of which it is one sum."""
    source = operand(table)
    rank = len(value(source).shape)
    given = table.args[1]
    dims = {int(dim) % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[arg-type]
    kept = len(value(table).shape) == rank
    rest = iter(places)
    every = [next(rest) if kept or dim not in dims else dim for dim in range(rank)]
    return source, [dim if dim in dims else place for dim, place in enumerate(every)]
