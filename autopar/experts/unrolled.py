"""Experts that a model goes through one after the other, all tokens with each: their sum, or their stack, as one.

``out = out + weights[:, 3:4] * expert_3(x)`` for each expert is a sum over experts, and ``stack([expert_3(x), ...])``
is a tensor over experts. Both are written with one call for all experts, so that the chosen pairs can be found; where
they are not, the graph becomes what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from autopar.experts.batched import Batch, Unlike
from autopar.ir.builder import Builder
from autopar.ir.node import output_node, value
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import operand

aten = torch.ops.aten


@dataclass(frozen=True)
class Rolled:
    """``original`` has no users any more: they use ``new``, which is computed from ``batch``."""

    original: fx.Node
    new: fx.Node
    batch: fx.Node  # over experts; it is gone when their pairs were found


def roll(graph: fx.Graph, counts: Set[int]) -> list[Rolled]:
    """Write sums and stacks of so many alike terms with one call for all. ``counts``: of experts to choose among."""
    found: list[Rolled] = []
    for node in list(graph.nodes):
        try:
            if node.target in (aten.stack.default, aten.cat.default) and len(node.all_input_nodes) in counts:
                found += _stack(node)
            elif _is_sum(node) and not (len(node.users) == 1 and _is_sum(next(iter(node.users)))):
                found += _sum(node, list(_terms(node)), counts)
        except Unlike:
            continue
    return found


def unroll_the_rest(graph: fx.Graph, rolled: Sequence[Rolled]) -> None:
    """Undo what nothing was found for."""
    alive = ancestors([output_node(graph)])
    for one in rolled:
        if one.batch in alive:
            one.new.replace_all_uses_with(one.original)


def _stack(node: fx.Node) -> Iterator[Rolled]:
    """A stack, or tensors of size 1 that are joined along this dim. Raises Unlike.

    A stack of all elements of a tensor is that tensor, which has other users: there is nothing to undo.
    """
    parts, dim = node.args[0], (*node.args[1:], 0)[0]
    assert isinstance(parts, (list, tuple)) and isinstance(dim, int)
    shape, op = value(node).shape, Builder(before=node)
    dim %= len(shape)
    if shape[dim] != len(parts):
        raise Unlike(node)
    known, batch = set(node.graph.nodes), Batch(node).of(tuple(parts))  # type: ignore[arg-type]
    new = op.reshape(batch, len(parts), *shape[:dim], *shape[dim + 1 :])
    if dim:
        order = list(range(1, len(shape)))
        order.insert(dim, 0)
        new = op(aten.permute.default, new, order)
    node.replace_all_uses_with(new)
    if new not in known:
        yield Rolled(node, new, batch)


def _sum(node: fx.Node, terms: list[fx.Node], counts: Set[int]) -> Iterator[Rolled]:
    targets = Counter(term.target for term in terms)
    alike = [term for term in terms if targets[term.target] in counts and term.op == "call_function"]
    if len({term.target for term in alike}) != 1:
        return
    batch, op = Batch(node).of(tuple(alike)), Builder(before=node)
    new = op(aten.sum.dim_IntList, batch, [0])
    for term in terms:
        new = new if term in alike else op(aten.add.Tensor, term, new)
    node.replace_all_uses_with(new)
    yield Rolled(node, new, batch)


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors of its own shape."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    return all(value(source).shape == value(node).shape for source in node.all_input_nodes)


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """All that is added, in order; what else is done with a part of the sum makes this part one term."""
    for source in (operand(node, 0), operand(node, 1)):
        if _is_sum(source) and len(source.users) == 1:
            yield from _terms(source)
        else:
            yield source
