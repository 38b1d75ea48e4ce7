"""Reduce gradients in a few large buckets instead of one by one.

    g1 = comm.all_reduce(d1, dp)           : f32[4,8]        r1   = aten.reshape(d1, [32])       : f32[32]
    g2 = comm.all_reduce(d2, dp)           : f32[8]    -->   r2   = aten.reshape(d2, [8])        : f32[8]
    return g1, g2                                            flat = aten.cat([r1, r2])           : f32[40]
                                                             sum  = comm.all_reduce(flat, dp)    : f32[40]
                                                             g1   = sum[0:32] as f32[4,8], g2 = sum[32:40]

A bucket is reduced as soon as its last gradient is there, in the order in which backward makes them; gradients of one
axis and dtype share buckets of ``Plan.bucket_mb`` megabytes (Li et al. 2020, PyTorch Distributed, section 3.2).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from autopar.comm import OPS
from autopar.layout import Layout
from autopar.pipeline import graph_pass
from autopar.program import Program, Role, Value, output_node, value
from autopar.rewrite import insert_before

aten = torch.ops.aten


@graph_pass()
def bucket_collectives(program: Program) -> Program:
    limit = program.plan.bucket_mb * 1e6
    for role in program.roles:
        if role.backward is not None and limit > 0:
            for bucket in _buckets(role, limit):
                _reduce_together(role.backward, bucket)
            role.backward.lint()
    return program


def _buckets(role: Role, limit: float) -> list[list[fx.Node]]:
    """Sum all-reduces whose results are only returned, grouped by axis and dtype, in order, none larger than limit."""
    assert role.backward is not None
    last = output_node(role.backward)
    filling: dict[tuple[object, torch.dtype], list[fx.Node]] = {}
    full: list[list[fx.Node]] = []
    for node in role.backward.nodes:
        if node.target is not OPS.all_reduce.default or node.args[2] != "sum" or set(node.users) != {last}:
            continue
        key = (node.args[1], value(node).dtype)
        bucket = filling.setdefault(key, [])
        if bucket and sum(map(_bytes, bucket)) + _bytes(node) > limit:
            full.append(bucket)
            bucket = filling[key] = []
        bucket.append(node)
    return [bucket for bucket in (*full, *filling.values()) if len(bucket) > 1]


def _bytes(node: fx.Node) -> int:
    return math.prod(value(node).shape) * value(node).dtype.itemsize


def _reduce_together(graph: fx.Graph, bucket: list[fx.Node]) -> None:
    last = bucket[-1]  # where all arguments are there
    shapes = [value(node).shape for node in bucket]
    lengths = [math.prod(shape) for shape in shapes]
    pieces = [
        insert_before(last, aten.reshape.default, (node.args[0], [length]), None, _typed(node, (length,)))
        for node, length in zip(bucket, lengths)
    ]
    whole = _typed(last, (sum(lengths),))
    flat = insert_before(last, aten.cat.default, (pieces,), None, whole)
    summed = insert_before(last, OPS.all_reduce.default, (flat, *last.args[1:]), None, whole)
    start = 0
    for node, shape, length in zip(bucket, shapes, lengths):
        bounds = (summed, 0, start, start + length)
        piece = insert_before(last, aten.slice.Tensor, bounds, None, _typed(node, (length,)))
        result = insert_before(last, aten.reshape.default, (piece, list(shape)), None, value(node))
        node.replace_all_uses_with(result)
        start += length
    for node in bucket:
        graph.erase_node(node)


def _typed(node: fx.Node, shape: tuple[int, ...]) -> Value:
    return replace(value(node), layout=Layout.whole(shape))
