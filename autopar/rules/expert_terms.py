"""Sums over experts, in which each summand is what one expert gives for the rows that chose it, and zero elsewhere.

term = sum over k of masked_fill(rows, not (chosen == 3), 0)        rows (T * k, ...): selected rows put back
term = masked_fill(rows, not (chosen == 3).any(-1), 0)              rows (T, ...): a mask for each token
term = (weight * (chosen == 3)).sum(-1) * rows                      rows (T, ...): every expert sees every token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir.node import value
from autopar.ir.rewrite import operand
from autopar.rules.choices import Choice, choice_of

aten = torch.ops.aten

KEEPS_ZEROS = {aten.reshape.default, aten.unsqueeze.default, aten._to_copy.default}


@dataclass(frozen=True)
class Term:
    """What the expert ``choice.number`` adds: ``rows`` (L, ...) where it was chosen.

    ``choice.ids`` have L elements for each of ``copies`` choices of a row.
    """

    rows: fx.Node
    choice: Choice
    copies: int


@dataclass(frozen=True)
class Sum:
    """``first + terms[0] + terms[1] + ...``, of which ``total`` is the last addition; terms in the order of experts."""

    total: fx.Node
    first: fx.Node | None  # what is not of an expert
    terms: tuple[Term, ...]

    @property
    def ids(self) -> fx.Node:
        return self.terms[0].choice.ids


def expert_sums(graph: fx.Graph) -> list[Sum]:
    """The sums of at least two terms, one for each expert from 0 on."""
    found: list[Sum] = []
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in seen or not _is_addition(node):
            continue
        first = node
        terms: list[Term] = []
        while _is_addition(first) and (first is node or len(first.users) == 1):
            split = _term_and_rest(first)
            if split is None:
                break
            seen.add(first)
            terms.append(split[0])
            first = split[1]
        alone = _term(first, node) if first is not node and len(first.users) == 1 else None
        terms += [alone] if alone is not None else []
        terms.sort(key=lambda term: term.choice.number)
        if len(terms) > 1 and _is_one_routing(terms):
            found.append(Sum(node, first if alone is None else None, tuple(terms)))
    return found


def _is_addition(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2


def _is_one_routing(terms: Sequence[Term]) -> bool:
    """Whether the terms are of experts 0, 1, ... that the same ids choose, in the same form."""
    forms = {(term.choice.ids, term.choice.dims, term.copies, value(term.rows).shape) for term in terms}
    return len(forms) == 1 and [term.choice.number for term in terms] == list(range(len(terms)))


def _term_and_rest(addition: fx.Node) -> tuple[Term, fx.Node] | None:
    sides = (operand(addition, 0), operand(addition, 1))
    for side, other in (sides[::-1], sides):
        term = _term(side, addition)
        if term is not None and value(other).shape == value(addition).shape:
            return term, other
    return None


def _term(node: fx.Node, total: fx.Node) -> Term | None:
    return (_put_back(node) or _weighted(node)) if value(node) == value(total) else None


def _put_back(term: fx.Node) -> Term | None:
    """Rows that are zero where a condition does not hold, with or without a sum over the choices of a row."""
    summed = term.target is aten.sum.dim_IntList and len(term.args) == 2
    parts = operand(term) if summed else term
    kept = operand(parts) if parts.target is aten.reshape.default else parts
    if kept.target is not aten.masked_fill.Scalar or kept.args[2] != 0 or value(kept) != value(operand(kept)):
        return None
    condition, rows = operand(kept, 1), operand(kept)
    if condition.target is not aten.logical_not.default:
        return None
    if summed:
        return _of_choices(rows, operand(condition), value(parts).shape, term.args[1])
    condition = operand(condition)
    while condition.target is aten.reshape.default:
        condition = operand(condition)
    if math.prod(value(condition).shape) != value(rows).shape[0]:
        return None
    if condition.target is aten.any.dim and len(condition.args) == 2:
        inner = operand(condition)
        choice, last = choice_of(inner), len(value(inner).shape) - 1
        exclusive = choice is not None and choice.is_exclusive and condition.args[1] in (-1, last)
        return Term(rows, choice, value(inner).shape[-1]) if choice and exclusive and _is_in_order(choice) else None
    choice = choice_of(condition)
    return None if choice is None or not _is_in_order(choice) else Term(rows, choice, 1)


def _of_choices(rows: fx.Node, condition: fx.Node, shape: Sequence[int], summed: Any) -> Term | None:
    """Rows for each choice, in a tensor of ``shape``, of which the last choice's dim is summed."""
    if not isinstance(summed, (list, tuple)) or len(summed) != 1:
        return None
    leading = tuple(shape[: summed[0] + 1])
    while condition.target is aten.reshape.default and value(condition).shape != leading:
        condition = operand(condition)
    if value(condition).shape != leading or math.prod(leading) != value(rows).shape[0]:
        return None
    choice = choice_of(condition)
    return None if choice is None or not _is_in_order(choice) else Term(rows, choice, 1)


def _is_in_order(choice: Choice) -> bool:
    """Whether the elements of the ids are in the order of those of the condition."""
    return choice.dims == tuple(range(len(choice.dims)))


def _weighted(term: fx.Node) -> Term | None:
    """A product with the weight that a row gives the expert, which is zero for one that it did not choose."""
    factors = [term]
    for factor in factors:
        weight = chosen_weight(factor)
        if weight is not None:
            _, choice = weight
            tokens, copies = value(choice.ids).shape
            whole = len(value(term).shape) > 1 and value(term).shape[0] == tokens
            return Term(term, choice, copies) if whole and choice.is_exclusive else None
        if factor.target is aten.mul.Tensor:
            factors += [side for side in factor.args if isinstance(side, fx.Node)]
        elif factor.target in KEEPS_ZEROS:
            factors.append(operand(factor))
    return None


def chosen_weight(node: fx.Node) -> tuple[fx.Node, Choice] | None:
    """w (T, k) and the choice, where ``node`` (T) or (T, 1) is ``(w * (chosen == 3)).sum(-1)``.

    Where a row has one choice, there may be no sum.
    """
    product = node
    if node.target is aten.sum.dim_IntList and node.args[1] in ([-1], [1]):
        product = operand(node)
    elif not value(node).shape or value(node).shape[-1] != 1:
        return None
    if product.target is not aten.mul.Tensor or len(value(product).shape) != 2 or len(product.all_input_nodes) != 2:
        return None
    sides = (operand(product, 0), operand(product, 1))
    for weight, condition in (sides, sides[::-1]):
        choice = choice_of(condition)
        if choice is not None and _is_in_order(choice) and value(weight).shape == value(choice.ids).shape:
            return weight, choice
    return None
