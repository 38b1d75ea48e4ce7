"""The formula of an attention mask, with the vectors and the bias that go with it, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autopar.ir.builder import Builder
from autopar.ir.node import value
from autopar.ir.rewrite import operand
from autopar.masks import truth
from autopar.masks.arithmetic import is_hidden
from autopar.masks.constants import Constants
from autopar.masks.documents import with_indices
from autopar.masks.proof import agrees
from autopar.masks.reading import Inexpressible, Reading, letter_of, whole_index
from autopar.masks.truth import Truth
from autopar.masks.values import Applied, Bias, Choice, Leaf, Masked, Number, Value, Vector, positions
from autopar.masks.vectors import HERE, emitted
from autopar.operators.predicates import Compare, Flag, Formula, Term

aten = torch.ops.aten


@dataclass(frozen=True)
class Recognised:
    """``bias`` where ``formula`` over ``vectors`` holds; nothing takes part elsewhere."""

    formula: Formula
    vectors: tuple[fx.Node, ...] = ()
    bias: fx.Node | None = None


class Recogniser:
    """Recognises the masks of one program; vectors that several masks share are inserted once.

    ``constants``: the tensors that are known now.
    """

    def __init__(self, constants: Mapping[fx.Node, Tensor]) -> None:
        self._known, self._constants = dict(constants), Constants(constants)
        self._inserted: dict[tuple[Value, str], fx.Node] = {}

    def recognise(
        self, attention: fx.Node, mask: fx.Node, queries: tuple[int, ...], keys: tuple[int, ...]
    ) -> Recognised | str:
        """What ``mask`` says for these shapes of q and k; a text where it stays a tensor.

        Vectors are inserted before ``attention``.
        """
        shape = value(mask).shape
        lead = {letter_of(n): shape[-n] for n in range(3, len(shape) + 1)}
        sizes = {**lead, "i": queries[-2], "j": keys[-2]}
        reading, derived = Reading(sizes, self._constants), frozenset[fx.Node]()
        try:
            found = reading.as_term(reading.of(mask, whole_index(shape)))
            if isinstance(found, Choice):
                shown, derived = with_indices(found.truth, reading)
                found = Choice(shown, found.yes, found.no)
            column = self._column(attention, mask, found, reading) if len(queries) > 2 else None
            shown, bias = (truth.TRUE, column) if column else self._said(found, sizes)
        except Inexpressible as problem:
            return str(problem)
        except truth.TooLongError:
            return f"{mask.name} says more than {truth.MOST_CLAUSES} clauses"
        formula, numbers = _renumbered(truth.formula(shown))
        vectors = [self._vector(attention, reading, n, _letter(truth.formula(shown), n)) for n in numbers]
        leaves = [node for vector in reading.vectors for node in _leaves(vector) if node not in derived]
        leaves += [bias] if bias and not column else []
        if not agrees(mask, formula, vectors, bias, leaves, self._known, (sizes["i"], sizes["j"])):
            return f"{mask.name} is not what its operators say: {formula}"
        return Recognised(formula, tuple(vectors), bias)

    def _column(self, attention: fx.Node, mask: fx.Node, found: Value, reading: Reading) -> fx.Node | None:
        """Keys that a finite number hides, as a bias (batch..., 1, 1, keys): a row without others attends to them."""
        match found:
            case Choice(shown, yes, no) if (
                not isinstance(yes, bool) and yes == 0 and is_hidden(Number(no)) and no != -torch.inf
            ):
                terms = [term for clause in shown for term in clause]
            case _:
                return None
        if len(terms) != 1 or not isinstance(terms[0], Flag) or terms[0].letter != "j":
            return None
        op = Builder(before=attention)
        kept = self._vector(attention, reading, terms[0].vector, "j")
        dims = len(value(mask).shape)
        kept = op.reshape(kept, *value(kept).shape[:-1], *[1] * min(dims - 1, 2), value(kept).shape[-1])
        hidden = op(aten.logical_not.default, kept) if terms[0].wanted else kept
        nothing = op(aten.full.default, [], 0.0, dtype=value(mask).dtype, device=HERE)
        return op(aten.masked_fill.Scalar, nothing, hidden, no)

    def _vector(self, attention: fx.Node, reading: Reading, number: int, letter: str) -> fx.Node:
        vector = reading.vectors[number]
        key = (vector, "".join(positions(vector)) or letter)  # the letter where it depends on the batch alone
        if key not in self._inserted:
            first_batch = 4 if len(value(operand(attention)).shape) > 3 else 3
            self._inserted[key] = emitted(Builder(before=attention), *key, reading.sizes, first_batch)
        return self._inserted[key]

    def _said(self, found: Value, sizes: Mapping[str, int]) -> tuple[Truth, fx.Node | None]:
        match found:
            case Number(number) if number is True or (not isinstance(number, bool) and number == 0):
                return truth.TRUE, None
            case Choice(shown, True, False):
                return shown, None
            case Choice(shown, yes, no) if not isinstance(yes, bool) and yes == 0 and is_hidden(Number(no)):
                self._check_keys(shown, no, sizes)
                return shown, None
            case Masked(bias, shown, hidden):
                self._check_keys(shown, hidden, sizes)
                return shown, bias.node
            case Bias(node):
                return truth.TRUE, node
            case Vector(Leaf(node, index)) if value(node).dtype != torch.bool and index == whole_index(
                value(node).shape
            ):
                return truth.TRUE, node
        raise Inexpressible(f"its elements are {found}")

    def _check_keys(self, shown: Truth, hidden: float, sizes: Mapping[str, int]) -> None:
        """Where no key is left in a row, finite numbers leave equal weights, and -inf none."""
        if hidden != -torch.inf and not truth.leaves_each_row_a_key(shown, sizes["i"], sizes["j"]):
            raise Inexpressible(
                f"hides by adding {hidden:.3g}: a row that it hides as a whole attends evenly to all keys"
            )


def _leaves(vector: Value) -> Iterator[fx.Node]:
    match vector:
        case Vector(Leaf(node)):
            yield node
        case Vector(Applied(_, operands)):
            for operand in operands:
                yield from _leaves(operand)


def _letter(formula: Formula, number: int) -> str:
    """Along which positions a vector counts."""
    for term in formula.terms:
        match term:
            case Compare(left, _, right) if number in (left, right):
                return "i" if number == left else "j"
            case Flag(vector, letter) if vector == number:
                return letter
    raise AssertionError(number)


def _renumbered(formula: Formula) -> tuple[Formula, list[int]]:
    """The formula with vectors counted from 0, and their numbers before."""
    numbers = list(dict.fromkeys(n for term in formula.terms for n in _numbers(term)))
    place = {number: n for n, number in enumerate(numbers)}
    clauses = tuple(tuple(_placed(term, place) for term in clause) for clause in formula.clauses)
    return Formula(clauses), numbers


def _numbers(term: Term) -> tuple[int, ...]:
    match term:
        case Compare(left, _, right):
            return left, right
        case Flag(vector):
            return (vector,)
    return ()


def _placed(term: Term, place: Mapping[int, int]) -> Term:
    match term:
        case Compare(left, relation, right):
            return Compare(place[left], relation, place[right])
        case Flag(vector, letter, wanted):
            return Flag(place[vector], letter, wanted)
    return term
