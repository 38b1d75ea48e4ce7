"""Rewrite sums of forward and backward graphs to operators that move fewer bytes; only rounding may change.

before:
  backward:
    a  = saved                   : f32[4,8]
    s  = saved                   : f32[]
    x  = saved                   : f32[4,8]
    e  = aten.expand(s, [4, 8])  : f32[4,8]
    d  = aten.div.Scalar(e, 8)   : f32[4,8]
    x2 = aten.mul.Scalar(x, 2.0) : f32[4,8]
    m  = aten.mul.Tensor(d, x2)  : f32[4,8]
    y  = aten.add.Tensor(a, m)   : f32[4,8]
    return w=y
after:
  backward:
    a       = saved                             : f32[4,8]
    s       = saved                             : f32[]
    x       = saved                             : f32[4,8]
    addcmul = aten.addcmul(a, s, x, value=0.25) : f32[4,8]
    return w=addcmul

Torch writes derivatives operator by operator: a product is stored before it is added, the gradient of a mean is
expanded before it is divided, the gradient of a half is a whole tensor of zeros that contains the half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused
from autopar.mesh import Mesh

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)
PRODUCTS = (aten.mm.default, aten.addmm.default)
NEAR = 8  # operators: a product further away from its sum would keep its two factors alive for long


@graph_pass()
def fuse_arithmetic(program: Program) -> Program:
    role = program.required_role
    for graph in (role.forward, role.backward):
        if graph is not None:
            _fuse(graph, program.mesh)
    return program


def _fuse(graph: fx.Graph, mesh: Mesh) -> None:
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(places):
        if node.target is aten.add.Tensor and not node.kwargs:
            op = Builder(before=node, mesh=mesh)
            new = _joined(op, node) or _matrix_sum(op, node) or _product_sum(op, node, places)
            if new is not None:
                places[new] = places[node]
                node.replace_all_uses_with(new)
    remove_unused(graph)


def _joined(op: Builder, node: fx.Node) -> fx.Node | None:
    """zeros with g in the first half + zeros with h in the second half -> cat(g, h)"""
    halves: tuple[Any, ...] = node.args[:2]
    if not all(_only(half, aten.slice_backward.default) for half in halves):
        return None
    low, high = sorted(halves, key=lambda half: int(half.args[3]))
    grad, sizes, dim, *low_bounds = low.args
    other, _, other_dim, *high_bounds = high.args
    (start, middle, step), (after, end, stride) = low_bounds, high_bounds
    if dim != other_dim or start != 0 or after != middle or end < sizes[dim] or (step, stride) != (1, 1):
        return None
    return op(aten.cat.default, [grad, other], dim, like=node)


def _matrix_sum(op: Builder, node: fx.Node) -> fx.Node | None:
    """mm(a, b) + mm(c, d) -> addmm(mm(a, b), c, d); views of them too"""
    for first, second in _terms(node):
        one, other = (term.all_input_nodes[0] if term.target in VIEWS else term for term in (first, second))
        if one.target not in PRODUCTS or not _only(other, aten.mm.default) or len(second.users) != 1:
            continue
        if op.shape(one) != op.shape(other) or value(one).dtype != value(other).dtype:
            continue
        found = op(aten.addmm.default, one, *other.args)
        return found if op.shape(node) == op.shape(other) else op(aten.view.default, found, list(op.shape(node)))
    return None


def _product_sum(op: Builder, node: fx.Node, places: dict[fx.Node, int]) -> fx.Node | None:
    """a + p * q -> addcmul(a, p, q)

    Only in this order: the layout of the first term in memory is that of the result, and later views rely on it.
    """
    terms: tuple[Any, ...] = node.args[:2]
    whole, product = terms
    if not isinstance(whole, fx.Node) or not _only(product, aten.mul.Tensor) or places[node] - places[product] > NEAR:
        return None
    factors = product.args[:2]
    if not all(isinstance(factor, fx.Node) for factor in factors) or op.shape(whole) != op.shape(node):
        return None
    dtype = value(node).dtype
    if not dtype.is_floating_point or any(value(term).dtype != dtype for term in (whole, *factors)):
        return None
    (one, factor), (other, by) = map(_peeled, factors)
    scale: dict[str, Any] = {} if factor * by == 1 else {"value": factor * by}
    return op(aten.addcmul.default, whole, one, other, like=node, **scale)


def _peeled(factor: Any) -> tuple[fx.Node, float]:
    """(x, 0.25) for expand(x) / 8 * 2"""
    scale = 1.0
    while True:
        if _only(factor, aten.mul.Scalar) and isinstance(factor.args[1], (int, float)):
            scale *= factor.args[1]
        elif _only(factor, aten.div.Scalar) and isinstance(factor.args[1], (int, float)):
            scale /= factor.args[1]
        elif not _only(factor, aten.expand.default):
            return factor, scale
        factor = factor.args[0]


def _terms(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(one, other) terms of a sum, in both orders; none where one is a number."""
    first, second = node.args[:2]
    if isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second:
        yield first, second
        yield second, first


def _only(node: Any, target: Any) -> bool:
    """Whether ``node`` is a plain call of ``target`` that one other node uses."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1 and not node.kwargs
