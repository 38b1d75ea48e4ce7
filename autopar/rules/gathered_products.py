"""Products of rows with matrices that are picked for each row: ``weight[ids]``, one matrix of a stack for each id.

The splitting rule of a product tells which of its dims are tokens, inner and outer, so every way to write such a
product (``bmm``, ``matmul``, ``einsum``) is found.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from autopar.ir.node import value
from autopar.ir.rewrite import operand
from autopar.mesh import Mesh
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Dims, Factoring

aten = torch.ops.aten


@dataclass(frozen=True)
class GatheredProduct:
    """Rows (tokens, I) times ``weight[ids]`` (tokens, choices, I and O in any order): (tokens, choices, O)."""

    rows: fx.Node
    weight: fx.Node
    ids: fx.Node
    tokens: int
    inner: int
    outer: int
    turned: bool  # the matrices of ``weight`` have O before I


def gathered_product(node: fx.Node, mesh: Mesh, weights: Set[fx.Node]) -> GatheredProduct | None:
    """The product with picked matrices of one of ``weights`` that ``node`` computes; None if it computes none."""
    rule = rule_for(node.target)
    if rule is None or len(node.all_input_nodes) != 2 or not any(map(_gather, node.all_input_nodes)):
        return None
    call = call_of(node, mesh)
    factoring = rule(call)
    for matrices, rows in ((0, 1), (1, 0)):
        gather = _gather(call.operands[matrices])
        if gather is None or operand(gather) not in weights or not factoring.contraction or len(call.operands) != 2:
            continue
        found = _sizes(factoring, matrices, rows)
        if found is not None:
            tokens, inner, outer, turned = found
            transposed = gather is not call.operands[matrices]
            ids = gather.args[1][0]  # type: ignore[index]
            assert isinstance(ids, fx.Node)
            return GatheredProduct(
                call.operands[rows], operand(gather), ids, tokens, inner, outer, turned != transposed
            )
    return None


def _gather(node: fx.Node) -> fx.Node | None:
    """The operands of ``weight[ids]``, perhaps below a transposition of its matrices."""
    rank = len(value(node).shape)
    if node.target is aten.transpose.int and {int(d) % rank for d in node.args[1:]} == {rank - 2, rank - 1}:  # type: ignore[arg-type]
        node = operand(node)
    if node.target is not aten.index.Tensor or len(value(operand(node)).shape) != 3:
        return None
    slots = node.args[1]
    assert isinstance(slots, (list, tuple))
    first = isinstance(slots[0], fx.Node) and value(slots[0]).dtype != torch.bool
    return node if first and all(slot is None for slot in slots[1:]) else None


def _sizes(factoring: Factoring, matrices: int, rows: int) -> tuple[int, int, int, bool] | None:
    """Tokens, I, O and whether O is before I in the matrices; None for a product of another form."""
    dims = factoring.inputs[matrices]
    own, others, result = (_flat(side) for side in (dims, factoring.inputs[rows], factoring.outputs[0]))
    if any(len(factors) != 1 for factors in dims) or not others or not result:
        return None
    lead, pair, inner, outer = own[:-2], own[-2:], others[-1], result[-1]
    tokens = others[:-1]
    if tokens != lead[: len(tokens)] or result[:-1] != lead or sorted(pair) != sorted((inner, outer)):
        return None
    sizes = factoring.sizes
    return math.prod(sizes[f] for f in tokens), sizes[inner], sizes[outer], pair == [outer, inner]


def _flat(dims: Dims) -> list[str]:
    return [factor for factors in dims for factor in factors]
