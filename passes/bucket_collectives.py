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


Chain = tuple[fx.Node, ...]  # all-reduces of one gradient over one axis after another; the last one is returned


def _buckets(role: Role, limit: float) -> list[list[Chain]]:
    """Sum all-reduces whose results are only returned, grouped by axes and dtype, in order, none larger than limit."""
    assert role.backward is not None
    last = output_node(role.backward)
    filling: dict[tuple[object, ...], list[Chain]] = {}
    full: list[list[Chain]] = []
    for node in role.backward.nodes:
        if not _is_sum(node) or set(node.users) != {last}:
            continue
        chain = _chain(node)
        key = (*(link.args[1] for link in chain), value(node).dtype)
        bucket = filling.setdefault(key, [])
        if bucket and sum(_bytes(links[-1]) for links in bucket) + _bytes(node) > limit:
            full.append(bucket)
            bucket = filling[key] = []
        bucket.append(chain)
    return [bucket for bucket in (*full, *filling.values()) if len(bucket) > 1]


def _is_sum(node: fx.Node) -> bool:
    return node.target is OPS.all_reduce.default and node.args[2] == "sum"


def _chain(node: fx.Node) -> Chain:
    links = [node]
    while True:
        source = links[0].args[0]
        assert isinstance(source, fx.Node)
        if not _is_sum(source) or set(source.users) != {links[0]}:
            return tuple(links)
        links.insert(0, source)


def _bytes(node: fx.Node) -> int:
    return math.prod(value(node).shape) * value(node).dtype.itemsize


def _reduce_together(graph: fx.Graph, bucket: list[Chain]) -> None:
    last = bucket[-1][-1]  # where all arguments are there
    results = [chain[-1] for chain in bucket]
    lengths = [math.prod(value(node).shape) for node in results]
    pieces = [
        insert_before(last, aten.reshape.default, (chain[0].args[0], [length]), None, _typed(chain[-1], (length,)))
        for chain, length in zip(bucket, lengths)
    ]
    whole = _typed(last, (sum(lengths),))
    flat = insert_before(last, aten.cat.default, (pieces,), None, whole)
    for link in bucket[-1]:
        flat = insert_before(last, OPS.all_reduce.default, (flat, *link.args[1:]), None, whole)
    start = 0
    for node, length in zip(results, lengths):
        bounds = (flat, 0, start, start + length)
        piece = insert_before(last, aten.slice.Tensor, bounds, None, _typed(node, (length,)))
        shape = list(value(node).shape)
        node.replace_all_uses_with(insert_before(last, aten.reshape.default, (piece, shape), None, value(node)))
        start += length
    for chain in bucket:
        for link in reversed(chain):
            graph.erase_node(link)


def _typed(node: fx.Node, shape: tuple[int, ...]) -> Value:
    return replace(value(node), layout=Layout.whole(shape))
