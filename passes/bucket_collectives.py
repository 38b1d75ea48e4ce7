"""Gather parameters, and reduce gradients, in a few large buckets instead of one by one.

before, on mesh(dp=2):
  backward:
    d1 = saved                   : f32[4,8]
    d2 = saved                   : f32[8]
    g1 = comm.all_reduce(d1, dp) : f32[4,8]
    g2 = comm.all_reduce(d2, dp) : f32[8]
    return v=g1, w=g2
after:
  backward:
    d1         = saved                                    : f32[4,8]
    d2         = saved                                    : f32[8]
    reshape    = aten.reshape(d1, [32])                   : f32[32]
    reshape_1  = aten.reshape(d2, [8])                    : f32[8]
    cat        = aten.cat([reshape, reshape_1])           : f32[40]
    all_reduce = comm.all_reduce(cat, dp)                 : f32[40]
    slice_1    = aten.slice.Tensor(all_reduce, 0, 0, 32)  : f32[32]
    reshape_2  = aten.reshape(slice_1, [4, 8])            : f32[4,8]
    slice_2    = aten.slice.Tensor(all_reduce, 0, 32, 40) : f32[8]
    reshape_3  = aten.reshape(slice_2, [8])               : f32[8]
    return v=reshape_2, w=reshape_3

Gradients are reduced as soon as the last of a bucket is there, in the order in which backward makes them; those of one
axis and dtype share buckets of ``Plan.bucket_mb`` megabytes (Li et al. 2020, PyTorch Distributed, section 3.2).
Sharded parameters are gathered before the first use of a bucket. Where whole gradients (``Plan(zero=2)``) or parameters
(3) must not pile up, a bucket is of one block only. What is large keeps its own collective, without copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.autodiff.differentiate import is_gathered
from autopar.ir.blocks import block_of
from autopar.ir.collectives import OPS, split_of, where
from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import Layout, Split
from autopar.ir.node import Value, output_node, value
from autopar.ir.program import Program
from autopar.ir.rewrite import insert_before
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh

aten = torch.ops.aten
TO = aten._to_copy.default
REDUCE, SCATTER = OPS.all_reduce.default, OPS.reduce_scatter.default
FIRST = Split(0)
ALONE = 0.25e6  # bytes: above, copies into a bucket and out of it cost more than a collective of its own

Chain = tuple[fx.Node, ...]  # reductions of one gradient over one axis after another, a cast; the last is returned


@graph_pass(when=lambda program: program.plan.bucket_mb > 0)
def bucket_collectives(program: Program) -> Program:
    limit = program.plan.bucket_mb * 1e6
    parameters = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
    role = program.required_role
    graphs = [role.forward, role.inference, role.backward]
    for graph in {id(graph): graph for graph in graphs if graph is not None}.values():
        _Buckets(program, graph, limit).gather([node for node in graph.nodes if is_gathered(node, parameters)])
    if role.backward is not None:
        _Buckets(program, role.backward, limit).reduce()
        role.backward.lint()
    return program


@dataclass
class _Buckets:
    program: Program
    graph: fx.Graph
    limit: float

    def gather(self, nodes: Sequence[fx.Node]) -> None:
        by_block = self.program.plan.zero == 3 and self.program.plan.reshard_after_forward
        plain = [(node,) for node in nodes if _is_plain(node) and not self._fills(node)]
        keys = [(n.target, n.args[1], value(n).dtype, block_of(n) if by_block else "") for (n,) in plain]
        for bucket in self._filled(plain, keys):
            _gather_together(self.program.mesh, [node for (node,) in bucket])

    def reduce(self) -> None:
        by_block = self.program.plan.zero > 1
        chains = list(self._chains())
        kinds = [tuple((link.target, *link.args[1:2], value(link).dtype) for link in chain) for chain in chains]
        blocks = [block_of(chain[0]) if by_block else "" for chain in chains]
        for bucket in self._filled(chains, list(zip(kinds, blocks))):
            _reduce_together(self.program.mesh, bucket)

    def _chains(self) -> Iterator[Chain]:
        """Sums of gradients over ranks whose results are only returned."""
        last = output_node(self.graph)
        for node in self.graph.nodes:
            users = set(node.users) if _is_sum(node) else set()
            casts = {user for user in users if user.target is TO and set(user.users) == {last}}
            if users == {last} or (len(casts) == 1 and users == casts):
                chain = (*_chain(node), *casts)
                if chain[0].target is REDUCE or not self._fills(chain[0]):
                    yield chain

    def _filled(self, chains: Sequence[Chain], keys: Sequence[tuple[Any, ...]]) -> list[list[Chain]]:
        """Those with equal keys together, in order, none larger than the limit; without those that are alone."""
        filling: dict[tuple[Any, ...], list[Chain]] = {}
        full: list[list[Chain]] = []
        for chain, key in zip(chains, keys):
            bucket = filling.setdefault(key, [])
            if bucket and sum(self._bytes(links[0]) for links in (*bucket, chain)) > self.limit:
                full.append(bucket)
                bucket = filling[key] = []
            bucket.append(chain)
        return [bucket for bucket in (*full, *filling.values()) if len(bucket) > 1]

    def _fills(self, node: fx.Node) -> bool:
        """Whether ``node`` is large, and lies so that it needs no copies by itself."""
        whole = node if node.target is not SCATTER else node.all_input_nodes[0]
        return split_of(node.args[1:]) == FIRST and self._bytes(whole) > ALONE

    def _bytes(self, node: fx.Node) -> int:
        return math.prod(value(node).layout.local_shape(self.program.mesh)) * value(node).dtype.itemsize


def _is_plain(node: fx.Node) -> bool:
    return split_of(node.args[1:]).contiguous


def _is_sum(node: fx.Node) -> bool:
    return (node.target is REDUCE and node.args[2] == "sum") or (node.target is SCATTER and _is_plain(node))


def _chain(node: fx.Node) -> Chain:
    links = [node]
    while links[0].target is REDUCE:
        source = links[0].args[0]
        assert isinstance(source, fx.Node)
        if not _is_sum(source) or set(source.users) != {links[0]}:
            break
        links.insert(0, source)
    return tuple(links)


class _Writer:
    """Writes operators on local tensors in front of a node."""

    def __init__(self, before: fx.Node, mesh: Mesh, dtype: torch.dtype | None = None) -> None:
        self.before, self.mesh, self.dtype = before, mesh, dtype or value(before).dtype

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return value(node).layout.local_shape(self.mesh)

    def __call__(
        self, target: Any, args: tuple[Any, ...], shape: Sequence[int], kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        return insert_before(self.before, target, args, kwargs, Value(self.dtype, Layout.whole(shape)))

    def reshape(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return self(aten.reshape.default, (node, list(shape)), shape)

    def narrow(self, node: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        shape = [stop - start if d == dim else size for d, size in enumerate(self.shape(node))]
        return self(aten.slice.Tensor, (node, dim, start, stop), shape)

    def permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        shape = self.shape(node)
        return self(aten.permute.default, (node, list(order)), [shape[dim] for dim in order])

    def apart(self, node: fx.Node, dim: int, ways: int) -> fx.Node:
        """(ways, n): the part of each rank in a row, that of the last padded with zeros."""
        shape = list(self.shape(node))
        part = -(-shape[dim] // ways)
        if missing := part * ways - shape[dim]:
            shape[dim] += missing
            padding = [0, 0] * (len(shape) - 1 - dim) + [0, missing]
            node = self(aten.constant_pad_nd.default, (node, padding, 0.0), shape)
        if dim:
            node = self.reshape(node, (*shape[:dim], ways, part, *shape[dim + 1 :]))
            node = self.permute(node, (dim, *(d for d in range(len(shape) + 1) if d != dim)))
        return self.reshape(node, (ways, math.prod(shape) // ways))

    def together(self, node: fx.Node, dim: int, ways: int, shape: Sequence[int]) -> fx.Node:
        """The inverse of :meth:`apart`."""
        part = -(-shape[dim] // ways)
        padded = [part * ways if d == dim else size for d, size in enumerate(shape)]
        if dim:
            node = self.reshape(node, (ways, *(part if d == dim else size for d, size in enumerate(shape))))
            node = self.permute(node, (*range(1, dim + 1), 0, *range(dim + 1, len(shape) + 1)))
        node = self.reshape(node, padded)
        return node if padded[dim] == shape[dim] else self.narrow(node, dim, 0, shape[dim])


def _gather_together(mesh: Mesh, bucket: Sequence[fx.Node]) -> None:
    first, axis, ways = bucket[0], bucket[0].args[1], bucket[0].args[2]
    assert isinstance(axis, str) and isinstance(ways, int)
    for node in bucket[1:]:
        _hoist(node.all_input_nodes[0], first)
    write = _Writer(first, mesh)
    lengths = [math.prod(write.shape(node.all_input_nodes[0])) for node in bucket]
    flat = [write.reshape(node.all_input_nodes[0], (length,)) for node, length in zip(bucket, lengths)]
    total = sum(lengths)
    own = write(aten.cat.default, (flat,), (total,))
    gathered = write(first.target, (own, *where(FIRST, axis, ways, ways * total)), (ways * total,))
    rows = write.reshape(gathered, (ways, total))
    start = 0
    for node, length in zip(bucket, lengths):
        write = _Writer(node, mesh)  # unpacked where it was gathered: just before its use
        piece = write.narrow(rows, 1, start, start + length)
        node.replace_all_uses_with(write.together(piece, split_of(node.args[1:]).dim, ways, write.shape(node)))
        start += length
    for node in bucket:
        node.graph.erase_node(node)


def _hoist(node: fx.Node, before: fx.Node) -> None:
    """Move a cast or view of a parameter, and what it is made of, to where it is needed earlier."""
    if node.op != "placeholder":
        for source in node.all_input_nodes:
            _hoist(source, before)
        before.prepend(node)


def _reduce_together(mesh: Mesh, bucket: list[Chain]) -> None:
    last, links = bucket[-1][-1], bucket[-1]  # where all arguments are there
    write = _Writer(last, mesh, value(links[0]).dtype)
    results = [chain[-1] for chain in bucket]
    lengths = [math.prod(write.shape(node)) for node in results]
    scatters, total = links[0].target is SCATTER, sum(lengths)
    given = [chain[0].all_input_nodes[0] for chain in bucket]
    if scatters:
        axis, ways = links[0].args[1], links[0].args[2]
        assert isinstance(axis, str) and isinstance(ways, int)
        rows = [write.apart(node, split_of(chain[0].args[1:]).dim, ways) for node, chain in zip(given, bucket)]
        flat = write.reshape(write(aten.cat.default, (rows, 1), (ways, total)), (ways * total,))
        flat = write(SCATTER, (flat, *where(FIRST, axis, ways, ways * total)), (total,))
    else:
        rows = [write.reshape(node, (length,)) for node, length in zip(given, lengths)]
        flat = write(aten.cat.default, (rows,), (total,))
    for link in links[scatters:]:
        write.dtype = value(link).dtype
        flat = write(link.target, (flat, *link.args[1:]), (total,), link.kwargs)
    start = 0
    for node, length in zip(results, lengths):
        piece = write.narrow(flat, 0, start, start + length)
        node.replace_all_uses_with(write.reshape(piece, write.shape(node)))
        start += length
    for chain in bucket:
        for link in reversed(chain):
            link.graph.erase_node(link)
