"""Packed documents: where positions count up by one within a document, comparisons of positions are those of indices.

Models compare the position ids of row and column, ``p[i] >= p[j]``, and number the documents by the jumps of the ids:
``d = cumsum(diff(p) != 1)``. Where d[i] == d[j] there is no jump between i and j, so p[i] - p[j] = i - j.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from autopar.ir.canonical_views import argument
from autopar.ir.node import value
from autopar.masks import truth
from autopar.masks.compare import compared
from autopar.masks.indices import aligned
from autopar.masks.reading import Inexpressible, Reading
from autopar.masks.truth import Truth
from autopar.masks.values import Affine, Choice, Leaf, Value, Vector, along
from autopar.operators.predicates import Compare, Term

aten = torch.ops.aten


def with_indices(shown: Truth, reading: Reading) -> tuple[Truth, frozenset[fx.Node]]:
    """The formula with indices for position ids, and the nodes of its vectors that are computed from these ids."""
    units = [term for clause in shown if len(clause) == 1 for term in clause]
    found, used = shown, set[fx.Node]()
    for document in units:
        if not isinstance(document, Compare) or document.relation != "==" or document.left != document.right:
            continue
        numbered = reading.vectors[document.left]
        positions = _counted(numbered, reading)
        if positions is None:
            continue
        assert isinstance(numbered, Vector) and isinstance(numbered.source, Leaf)
        replaced = frozenset(frozenset(_of_indices(term, positions, reading) for term in clause) for clause in found)
        if replaced != found:
            gone = {term for clause in found - replaced for term in clause if isinstance(term, Compare)}
            vectors = [reading.vectors[number] for term in gone for number in (term.left, term.right)]
            used |= {vector.source.node for vector in vectors if vector != positions}  # type: ignore[union-attr]
            used.add(numbered.source.node)
            found = truth.both(replaced)
    return truth.over(found, reading.sizes["i"], reading.sizes["j"]), frozenset(used)


def _counted(documents: Value, reading: Reading) -> Value | None:
    """p, for a vector cumsum(diff(p) != 1)."""
    if not isinstance(documents, Vector) or not isinstance(documents.source, Leaf):
        return None
    node, index = documents.source.node, documents.source.index
    if node.target is not aten.cumsum.default or node.args[1] not in (-1, len(index) - 1):
        return None
    (jumps,) = node.all_input_nodes
    if jumps.target is not aten.ne.Scalar or jumps.args[1] != 1:
        return None
    difference = jumps.all_input_nodes[0]
    order, dim = argument(difference, 1, "n", 1), argument(difference, 2, "dim", -1)
    source = difference.args[0] if difference.target is aten.diff.default else None
    if order != 1 or dim not in (-1, len(index) - 1) or not isinstance(source, fx.Node):
        return None
    if value(source).shape != value(node).shape:
        return None
    return _base(source, index, reading)[0]


def _base(node: fx.Node, index: tuple[Affine, ...], reading: Reading) -> tuple[Value | None, int]:
    """A vector and the number that is added to it."""
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(node.args[1], int) and not node.kwargs:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found, added = _base(source, aligned(index, value(node).shape, value(source).shape), reading)
        return found, added + node.args[1] * (1 if node.target is aten.add.Tensor else -1)
    try:
        found = reading.of(node, index)
    except Inexpressible:
        return None, 0
    if isinstance(found, Vector) and isinstance(found.source, Leaf) and found.source.node is not node:
        return _base(found.source.node, found.source.index, reading)
    return along(found, "i"), 0


def _of_indices(term: Term, positions: Value, reading: Reading) -> Term:
    """A comparison of positions, plus or minus numbers, as one of indices."""
    if not isinstance(term, Compare):
        return term
    sides = []
    for number, letter in ((term.left, "i"), (term.right, "j")):
        vector = reading.vectors[number]
        if not isinstance(vector, Vector) or not isinstance(vector.source, Leaf):
            return term
        base, added = _base(vector.source.node, vector.source.index, reading)
        if base != positions:
            return term
        sides.append(Affine(((letter, 1),), added))
    sizes: Mapping[str, int] = {"i": 2**40, "j": 2**40}  # no comparison is decided by the size
    found = compared(term.relation, sides[0], sides[1], reading.number_of, sizes)
    if not isinstance(found, Choice) or len(found.truth) != 1 or len(next(iter(found.truth))) != 1:
        return term
    return next(iter(next(iter(found.truth))))
