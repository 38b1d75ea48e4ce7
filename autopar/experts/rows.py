"""Tensors as rows: (rows, further dims), with one row for each chosen pair of token and expert, or for each token.

The pairs are in the order of the tokens, the choices of one token next to each other. Further dims are those that count
neither tokens nor experts nor choices, in the order in which the tensor has them; a dim of size 1 is one of them.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.experts.choices import Chosen, Constants, constant
from autopar.experts.digits import CHOICE, EXPERT, OTHER, TOKEN, Digit, Place, Places, Unaligned, size_of
from autopar.ir.builder import Builder
from autopar.ir.node import Origin, origin, set_origin, value
from autopar.ir.rewrite import operand

aten = torch.ops.aten

_SAME_ORDER = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}


class Lead(enum.Enum):
    """What the first dim of a tensor counts."""

    PAIR = (TOKEN, CHOICE)
    TOKEN = (TOKEN,)
    EXPERT = (EXPERT,)
    NOTHING = ()  # there is no such dim


@dataclass(frozen=True)
class Rows:
    """``node`` is (lead, *further)."""

    node: fx.Node
    lead: Lead
    further: tuple[int, ...]


def further(places: Places) -> tuple[int, ...]:
    """The sizes of the further dims."""
    return tuple(size_of(place, OTHER) for place in places if is_further(place))


def is_further(place: Place) -> bool:
    return not place or any(digit.of == OTHER for digit in place)


class Copier(Builder):
    """A builder whose new operators have the origin of those that they stand for."""

    origin = Origin()

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().__call__(target, *args, **kwargs)
        set_origin(node, self.origin)
        return node


class Arranger:
    """Puts tensors into rows and back, in front of one node."""

    def __init__(self, constants: Constants, chosen: Chosen, experts: int, before: fx.Node) -> None:
        self.op, self.constants = Copier(before=before), constants
        self.op.origin = origin(before)
        self.choices = chosen.choices
        self.counts = {TOKEN: chosen.tokens, CHOICE: chosen.choices, EXPERT: experts}
        self.ids = self.shaped(self.rows_of(chosen.ids, chosen.places, Lead.PAIR).node, *self.length(Lead.PAIR))

    def length(self, lead: Lead) -> list[int]:
        """The sizes that a lead takes in a shape: one, or none."""
        return [math.prod(self.counts[of] for of in lead.value)] if lead.value else []

    def rows_of(self, node: fx.Node, places: Places, lead: Lead) -> Rows:
        """``node`` as rows; repeated for tokens or choices that it does not tell apart. Raises Unaligned."""
        digits = list(itertools.chain(*places))
        order = sorted(range(len(digits)), key=lambda i: self._rank(digits[i], lead))
        here, full = self._with_gaps([digits[i] for i in order], lead)
        found = self._permuted(node, [digit.size for digit in digits], order)
        rest = further(places)
        if here != full:
            found = self.op(aten.expand.default, self.shaped(found, *here), full)
        return Rows(self.shaped(found, *self.length(lead), *rest), lead, rest)

    def _rank(self, digit: Digit, lead: Lead) -> tuple[int, int]:
        return (lead.value.index(digit.of), -digit.stride) if digit.of in lead.value else (len(lead.value), 0)

    def _with_gaps(self, digits: list[Digit], lead: Lead) -> tuple[list[int], list[int]]:
        """The sizes of ordered digits, with 1 for those that are missing; and with the sizes of these."""
        here: list[int] = []
        full: list[int] = []
        for of in lead.value:
            above = self.counts[of]
            for digit in (*(digit for digit in digits if digit.of == of), Digit(of, 1)):
                gap, overlap = divmod(above, digit.size * digit.stride)
                if not gap or overlap:
                    raise Unaligned(f"{of}s of a diagonal")
                here += [1, digit.size] if gap > 1 else [digit.size]
                full += [gap, digit.size] if gap > 1 else [digit.size]
                above = digit.stride
        others = [digit.size for digit in digits if digit.of == OTHER]
        return here + others, full + others

    def _permuted(self, node: fx.Node, sizes: list[int], order: list[int]) -> fx.Node:
        if order == list(range(len(order))):
            return node
        parts = self.shaped(node, *sizes)
        moved = [i for i in range(len(order)) if order[i] != i]
        if len(moved) == 2:
            return self.op(aten.transpose.int, parts, *moved)
        return self.op(aten.permute.default, parts, order)

    def shaped(self, node: fx.Node, *shape: int) -> fx.Node:
        """``node`` in another shape; the tensor that it was reshaped from, if that has the shape, or is reshaped."""
        below = node
        while value(below).shape != shape and below.target in _SAME_ORDER:
            below = operand(below)
        return self.op.reshape(below, *shape)

    def product(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Elementwise; a factor of ones is left out where the other one has the type of the product."""
        for ones, other in ((left, right), (right, left)):
            kind = value(other)
            broadcast = torch.broadcast_shapes(value(ones).shape, kind.shape)  # type: ignore[no-untyped-call]
            if constant(ones, self.constants) == 1 and broadcast == kind.shape and kind.dtype.is_floating_point:
                return other
        return self.op(aten.mul.Tensor, left, right)

    def table(self, node: fx.Node, places: Places) -> fx.Node:
        """A tensor with one number for each token and each expert as (tokens, experts). Raises Unaligned."""
        digits = list(itertools.chain(*places))
        order = sorted(range(len(digits)), key=lambda i: (digits[i].of == EXPERT, -digits[i].stride))
        tokens, experts = (size_of(digits, of) for of in (TOKEN, EXPERT))
        if (tokens, experts) != (self.counts[TOKEN], self.counts[EXPERT]):
            raise Unaligned("it has fewer tokens or experts")
        return self.shaped(self._permuted(node, [digit.size for digit in digits], order), tokens, experts)

    def pairs(self, rows: Rows) -> Rows:
        """One row for each pair; what has no rows stays, and is the same for all of them."""
        if rows.lead is Lead.TOKEN and self.choices > 1:
            node = self.op(aten.repeat_interleave.self_int, rows.node, self.choices, 0)
        elif rows.lead is Lead.EXPERT:
            node = self.op(aten.index.Tensor, rows.node, [self.ids])
        else:
            node = rows.node
        return Rows(node, rows.lead if rows.lead is Lead.NOTHING else Lead.PAIR, rows.further)

    def summed(self, rows: Rows, places: Places, shape: tuple[int, ...]) -> fx.Node:
        """The sum over the choices of each token in ``places``, which may keep the choices apart."""
        digits = list(itertools.chain(*places))
        lead = Lead.PAIR if any(digit.of == CHOICE for digit in digits) or self.choices == 1 else Lead.TOKEN
        found = rows.node
        if lead is Lead.TOKEN:
            parts = self.op.reshape(found, *self.length(lead), self.choices, *rows.further)
            found = self.op(aten.sum.dim_IntList, parts, [1])
        order = sorted(range(len(digits)), key=lambda i: self._rank(digits[i], lead))
        back = [order.index(i) for i in range(len(order))]
        return self.op.reshape(self._permuted(found, [digits[i].size for i in order], back), *shape)

    def reordered(self, rows: Rows, names: list[str], sizes: Mapping[str, int], wanted: Iterable[str]) -> Rows:
        """``rows``, whose further dims are ``names``, with those that are ``wanted``; new ones are repeated."""
        wanted, lead = list(wanted), self.length(rows.lead)
        node, kept = rows.node, [name for name in wanted if name in names]
        if kept != names:
            shift = len(lead)
            order = [*range(shift), *(shift + names.index(name) for name in kept)]
            node = self._permuted(node, [*lead, *(sizes[name] for name in names)], order)
        full = tuple(sizes[name] for name in wanted)
        if len(kept) < len(wanted):
            node = self.shaped(node, *lead, *(sizes[name] if name in names else 1 for name in wanted))
            node = self.op(aten.expand.default, node, [*lead, *full])
        return Rows(self.shaped(node, *lead, *full), rows.lead, full)
