"""The value of each element of a mask, followed back through views and pointwise operators to what they start from.

What a node holds at an index (i, j, ...) follows from its operands at their indices: the abstract interpretation of a
pointwise graph, with no tensor of its size. It ends at positions (``arange``), numbers, and *leaves*: whatever else
depends on one position alone becomes a vector, and a floating tensor of both stays as a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from autopar.ir.node import origin, value
from autopar.ir.operator_facts import is_pointwise
from autopar.ir.text import operator_name
from autopar.masks import arithmetic, truth
from autopar.masks.compare import compared
from autopar.masks.constants import Constants
from autopar.masks.indices import Index, aligned, through_view
from autopar.masks.values import (
    ZERO,
    Affine,
    Applied,
    Bias,
    Choice,
    Leaf,
    Number,
    Value,
    Vector,
    along,
    letters_of,
    positions,
)
from autopar.operators.predicates import Flag

aten = torch.ops.aten

Letters = Mapping[str, int]


class Inexpressible(Exception):
    """A mask, or a part of one, that is no formula; the message says at which operator."""


class Reading:
    """The values of one mask. ``sizes``: of the letters. ``vectors``: those of its formula, by their numbers."""

    def __init__(self, sizes: Letters, constants: Constants) -> None:
        self.sizes, self.constants = sizes, constants
        self.vectors: list[Value] = []
        self._found: dict[tuple[fx.Node, Index], Value | str] = {}

    def number_of(self, vector: Value) -> int:
        if self.sizes["i"] == self.sizes["j"]:  # one vector for rows and columns
            vector = along(vector, "i")
        if vector not in self.vectors:
            self.vectors.append(vector)
        return self.vectors.index(vector)

    def of(self, node: fx.Node, index: Index) -> Value:
        """The element of ``node`` at ``index``; raises Inexpressible."""
        key = (node, index)
        if key not in self._found:
            try:
                self._found[key] = self._simplified(self._value(node, index))
            except Inexpressible as problem:
                self._found[key] = str(problem)
            except truth.TooLongError:
                self._found[key] = f"{node.name} says more than {truth.MOST_CLAUSES} clauses"
        found = self._found[key]
        if isinstance(found, str):
            raise Inexpressible(found)
        return found

    def _simplified(self, found: Value) -> Value:
        if not isinstance(found, Choice):
            return found
        left = truth.over(found.truth, self.sizes["i"], self.sizes["j"])
        if left in (truth.TRUE, truth.FALSE):
            return Number(found.yes if left == truth.TRUE else found.no)
        return Choice(left, found.yes, found.no)

    def _value(self, node: fx.Node, index: Index) -> Value:
        start = arithmetic.start_of(node, index)
        if start is not None:
            return start
        try:
            viewed = through_view(node, index) or self._picked(node, index)
            if viewed:
                return self.of(*viewed)
            if node.target in (aten.tril.default, aten.triu.default):
                return self._triangle(node, index)
            if is_pointwise(node.target):
                return self._pointwise(node, index)
        except Inexpressible:
            found = self._leaf(node, index)
            if found is None:
                raise
            return found
        found = self._leaf(node, index)
        if found is None:
            raise Inexpressible(
                f"{node.name} = {operator_name(node.target) if node.op == 'call_function' else node.op}"
                f" depends on row and column{_at(node)}"
            )
        return found

    # ------------------------------------------------------------ where elements come from

    def _picked(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """The source of a look-up by position: ``x[..., position, ...]``."""
        try:
            if node.target is aten.index_select.default:
                source, dim, picks = node.args
                assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
                dim = int(dim) % len(index)  # type: ignore[arg-type]
                entry = self._position(picks, (index[dim],), value(source).shape[dim])
                return None if entry is None else (source, (*index[:dim], entry, *index[dim + 1 :]))
            if node.target is aten.gather.default:
                source, dim, picks = node.args[:3]
                assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
                dim = int(dim) % len(index)  # type: ignore[arg-type]
                entry = self._position(picks, index, value(source).shape[dim])
                return None if entry is None else (source, (*index[:dim], entry, *index[dim + 1 :]))
            if node.target is aten.index.Tensor:
                return self._indexed(node, index)
        except Inexpressible:
            pass
        return None

    def _indexed(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """``x[first, second]`` with an index for each of the leading dims."""
        source, picks = node.args
        assert isinstance(source, fx.Node) and isinstance(picks, (list, tuple))
        shape = value(source).shape
        if not all(isinstance(pick, fx.Node) and value(pick).dtype is torch.int64 for pick in picks):
            return None
        spread = torch.broadcast_shapes(*(value(pick).shape for pick in picks))  # type: ignore[no-untyped-call, union-attr, arg-type]
        head = index[: len(spread)]
        entries = [
            self._position(pick, aligned(head, spread, value(pick).shape), size)  # type: ignore[arg-type]
            for pick, size in zip(picks, shape)
        ]
        if any(entry is None for entry in entries):
            return None
        return source, (*entries, *index[len(spread) :])  # type: ignore[arg-type]

    def _position(self, picks: fx.Node, index: Index, size: int) -> Affine | None:
        """The position that is looked up, where it is a sum of letters within a dim of ``size``."""
        found = self.of(picks, index)
        if isinstance(found, Number):
            found = Affine((), int(found.number))
        if not isinstance(found, Affine):
            return None
        low, high = found.bounds(self.sizes)
        return found if low >= 0 and high < size else None

    # ------------------------------------------------------------ operators

    def _triangle(self, node: fx.Node, index: Index) -> Value:
        """``tril(x, k)``: x where column <= row + k, else 0."""
        diagonal = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        below = index[-2].plus(index[-1], -1).plus(Affine((), diagonal))  # row + k - column
        difference = below if node.target is aten.tril.default else below.times(-1)
        inside = compared(">=", difference, Number(0), self.number_of, self.sizes)
        kept = self.of(operand_of(node), index)
        zero = False if value(node).dtype is torch.bool else 0
        found = arithmetic.chosen(inside, kept, Number(zero))
        if found is None:
            raise Inexpressible(f"{node.name} = {operator_name(node.target)} is neither of two numbers{_at(node)}")
        return found

    def _pointwise(self, node: fx.Node, index: Index) -> Value:
        operands = tuple(
            self.of(arg, aligned(index, value(node).shape, value(arg).shape))
            if isinstance(arg, fx.Node)
            else Number(arg)  # type: ignore[arg-type]
            for arg in node.args
            if isinstance(arg, (fx.Node, bool, int, float))
        )
        found = arithmetic.applied(node, tuple(map(self.as_term, operands)), operands, self.sizes, self.number_of)
        if found is None or self._is_mixed(found):
            found = self._vector(node, index, operands) or found
        if found is None:
            raise Inexpressible(f"{node.name} = {operator_name(node.target)} has no form as a formula{_at(node)}")
        return found

    def as_term(self, found: Value) -> Value:
        """A bool vector as a term."""
        if isinstance(found, Vector) and found.boolean:
            letter = "i" if positions(found) == {"i"} else "j"
            return Choice(truth.of(Flag(self.number_of(found), letter)), True, False)  # type: ignore[arg-type]
        return found

    def _is_mixed(self, found: Value) -> bool:
        """Whether it is a formula over one position that is better one vector."""
        if not isinstance(found, Choice) or len(positions(found)) > 1:
            return False
        terms = [term for clause in found.truth for term in clause]
        return len(terms) > 1 and any(isinstance(term, Flag) for term in terms)

    # ------------------------------------------------------------ leaves

    def _leaf(self, node: fx.Node, index: Index) -> Value | None:
        letters = Leaf(node, index).letters
        known = self.constants.of(node, index, self.sizes)
        if known is not None:
            return known
        if len(letters & frozenset("ij")) < 2 and "d3" not in letters and _is_simple(index):
            return Vector(Leaf(node, index), value(node).dtype is torch.bool)
        if value(node).dtype.is_floating_point and self._is_aligned(node, index):
            return Bias(node)
        return None

    def _vector(self, node: fx.Node, index: Index, operands: Sequence[Value]) -> Vector | None:
        letters = frozenset().union(*map(letters_of, operands))
        if len(letters & frozenset("ij")) > 1 or "d3" in letters:
            return None
        if len(Leaf(node, index).letters & frozenset("ij")) < 2 and _is_simple(index):
            return Vector(Leaf(node, index), value(node).dtype is torch.bool)
        if any(isinstance(operand, Choice) for operand in operands):
            return None
        return Vector(Applied(node, tuple(operands)), value(node).dtype is torch.bool)

    def _is_aligned(self, node: fx.Node, index: Index) -> bool:
        """Whether the dims are those of the scores, in their order."""
        return index == whole_index(value(node).shape)


def whole_index(shape: Sequence[int]) -> Index:
    """The index of a mask: columns last, then rows, heads, batch."""
    return tuple(Affine(((letter_of(len(shape) - dim), 1),)) if size != 1 else ZERO for dim, size in enumerate(shape))


def letter_of(from_the_right: int) -> str:
    return {1: "j", 2: "i"}.get(from_the_right, f"d{from_the_right}")


def operand_of(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _is_simple(index: Index) -> bool:
    """Whether each dim is a number or counts along one letter, each letter once."""
    letters = [letter for entry in index for letter, _ in entry.factors]
    plain = all(len(entry.factors) < 2 and all(factor == 1 for _, factor in entry.factors) for entry in index)
    return plain and len(letters) == len(set(letters))


def _at(node: fx.Node) -> str:
    source = origin(node).source
    return f" at {source}" if source else ""
