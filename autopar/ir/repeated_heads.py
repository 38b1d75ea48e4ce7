"""Grouped-query attention in graphs: heads of keys and values, repeated for the queries that share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from autopar.ir.node import Node

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
ShapeOf = Callable[[Node], Sequence[int]]


def unrepeated_heads(keys: Node, values: Node, shape_of: ShapeOf) -> tuple[Node, Node]:
    """The keys and values (B, Hkv, S, D) whose heads these (B, H, S, D) repeat one by one, or else these themselves.

    Models write grouped-query attention as unsqueeze, expand, reshape. Our attention takes the fewer heads directly, so
    the repeated ones are neither computed nor saved nor sent. It requires as many heads of keys as of values: where one
    of the two has been converted in between (a gather of repeated heads), both stay repeated.
    """
    fewer = _unrepeated(keys, shape_of), _unrepeated(values, shape_of)
    heads = [shape_of(source)[1:2] for source in fewer]
    return fewer if heads[0] == heads[1] else (keys, values)


def _unrepeated(node: Node, shape_of: ShapeOf) -> Node:
    if node.target not in RESHAPES:
        return node
    expand = node.all_input_nodes[0]
    if expand.target is aten.clone.default:
        expand = expand.all_input_nodes[0]
    unsqueeze = expand.all_input_nodes[0] if expand.target is aten.expand.default else node
    if unsqueeze.target is not aten.unsqueeze.default:
        return node
    source = unsqueeze.all_input_nodes[0]
    if len(shape_of(source)) != 4 or len(shape_of(expand)) != 5:
        return node
    batch, heads, length, width = shape_of(source)
    repeats = shape_of(expand)[2]
    wide = tuple(shape_of(unsqueeze)) == (batch, heads, 1, length, width)
    expanded = tuple(shape_of(expand)) == (batch, heads, repeats, length, width)
    merged = tuple(shape_of(node)) == (batch, heads * repeats, length, width)
    return source if wide and expanded and merged else node
