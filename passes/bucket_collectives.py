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

A bucket of gradients is reduced once its last gradient is available, in the order in which backward makes them. One
bucket holds ``Plan.bucket_mb`` megabytes of one axis and dtype (Li et al. 2020, PyTorch Distributed, section 3.2).
A bucket of sharded parameters is gathered before its first use. Where whole gradients (``Plan(zero=2)``) or parameters
(3) must not accumulate, a bucket holds one block only, or blocks of less than a megabyte of gradients (2). A large
parameter has a gather without copies; so does a gradient above the size of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.autodiff.differentiate import is_gathered
from autopar.ir import shards
from autopar.ir.blocks import block_of
from autopar.ir.builder import Builder
from autopar.ir.collectives import OPS, split_of, where
from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import Split
from autopar.ir.node import output_node, value
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh

aten = torch.ops.aten
TO = aten._to_copy.default
REDUCE, SCATTER = OPS.all_reduce.default, OPS.reduce_scatter.default
FIRST = Split(0)
ALONE = 0.25e6  # bytes: above, the copies of a parameter into a bucket and out of it cost more than its own gather
LEAST = 1e6  # bytes that are sent in the time that a collective takes by itself

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
    return program


@dataclass
class _Buckets:
    program: Program
    graph: fx.Graph
    limit: float

    def gather(self, nodes: Sequence[fx.Node]) -> None:
        by_block = self.program.plan.zero == 3 and self.program.plan.reshard_after_forward
        plain = [(node,) for node in nodes if split_of(node.args[1:]).contiguous and not self._fills(node)]
        keys = [(n.target, n.args[1], value(n).dtype, block_of(n) if by_block else "") for (n,) in plain]
        for bucket in self._filled(plain, keys):
            _gather_together(self.program.mesh, [node for (node,) in bucket])

    def reduce(self) -> None:
        chains = list(self._chains())
        kinds = [tuple((link.target, *link.args[1:2], value(link).dtype) for link in chain) for chain in chains]
        for bucket in self._filled(chains, kinds, {2: LEAST, 3: 0}.get(self.program.plan.zero, math.inf)):
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

    def _filled(self, chains: Sequence[Chain], keys: Sequence[Any], least: float = math.inf) -> list[list[Chain]]:
        """Chains with equal keys in buckets, in order, none larger than the limit; without chains that stay alone."""
        filling: dict[Any, list[Chain]] = {}
        full: list[list[Chain]] = []
        for chain, key in zip(chains, keys):
            bucket = filling.setdefault(key, [])
            held = sum(self._sent(links[0]) for links in bucket)
            ends = bool(bucket) and held >= least and block_of(bucket[-1][0]) != block_of(chain[0])
            if ends or (bucket and held + self._sent(chain[0]) > self.limit):
                full.append(bucket)
                bucket = filling[key] = []
            bucket.append(chain)
        return [bucket for bucket in (*full, *filling.values()) if len(bucket) > 1]

    def _fills(self, node: fx.Node) -> bool:
        """Whether ``node`` is large, and laid out so that it needs no copies by itself."""
        return split_of(node.args[1:]) == FIRST and self._sent(node) > (self.limit if node.target is SCATTER else ALONE)

    def _sent(self, node: fx.Node) -> int:
        whole = node if node.target is not SCATTER else node.all_input_nodes[0]
        return math.prod(value(whole).layout.local_shape(self.program.mesh)) * value(whole).dtype.itemsize


def _is_sum(node: fx.Node) -> bool:
    scatters = node.target is SCATTER and split_of(node.args[1:]).contiguous
    return scatters or (node.target is REDUCE and node.args[2] == "sum")


def _chain(node: fx.Node) -> Chain:
    links = [node]
    while links[0].target is REDUCE:
        source = operand(links[0])
        if not _is_sum(source) or set(source.users) != {links[0]}:
            break
        links.insert(0, source)
    return tuple(links)


def _gather_together(mesh: Mesh, bucket: Sequence[fx.Node]) -> None:
    first, axis, ways = bucket[0], bucket[0].args[1], bucket[0].args[2]
    assert isinstance(axis, str) and isinstance(ways, int)
    for node in bucket[1:]:
        _hoist(node.all_input_nodes[0], first)
    op = Builder(before=first, mesh=mesh)
    sources = [node.all_input_nodes[0] for node in bucket]
    lengths = [math.prod(op.shape(source)) for source in sources]
    total = sum(lengths)
    own = op(aten.cat.default, [op(aten.reshape.default, source, [length]) for source, length in zip(sources, lengths)])
    gathered = op(first.target, own, *where(FIRST, axis, ways, ways * total))
    rows = op(aten.reshape.default, gathered, [ways, total])
    start = 0
    for node, length in zip(bucket, lengths):
        op = Builder(before=node, mesh=mesh)  # unpacked where it was gathered: just before its use
        piece = op(aten.slice.Tensor, rows, 1, start, start + length)
        node.replace_all_uses_with(shards.together(op, piece, op.shape(node), split_of(node.args[1:]).dim, ways))
        start += length
    for node in bucket:
        node.graph.erase_node(node)


def _hoist(node: fx.Node, before: fx.Node) -> None:
    """Move a cast or view of a parameter, and the nodes it is computed from, to an earlier place where it is needed."""
    if node.op != "placeholder":
        for source in node.all_input_nodes:
            _hoist(source, before)
        before.prepend(node)


def _reduce_together(mesh: Mesh, bucket: list[Chain]) -> None:
    last, links = bucket[-1][-1], bucket[-1]  # where all arguments are available
    op = Builder(before=last, mesh=mesh)
    results, given = [chain[-1] for chain in bucket], [chain[0].all_input_nodes[0] for chain in bucket]
    lengths = [math.prod(op.shape(node)) for node in results]
    scatters, total = links[0].target is SCATTER, sum(lengths)
    if scatters:
        axis, ways = links[0].args[1], links[0].args[2]
        assert isinstance(axis, str) and isinstance(ways, int)
        dims = [split_of(chain[0].args[1:]).dim for chain in bucket]
        rows = [shards.apart(op, node, op.shape(node), dim, ways) for node, dim in zip(given, dims)]
        flat = op(aten.reshape.default, op(aten.cat.default, rows, 1), [ways * total])
        flat = op(SCATTER, flat, *where(FIRST, axis, ways, ways * total))
    else:
        flat = op(aten.cat.default, [op(aten.reshape.default, node, [length]) for node, length in zip(given, lengths)])
    for link in links[scatters:]:
        settings: dict[str, Any] = dict(link.kwargs)
        flat = op(link.target, flat, *link.args[1:], **settings)
    start = 0
    for node, length in zip(results, lengths):
        piece = op(aten.slice.Tensor, flat, 0, start, start + length)
        node.replace_all_uses_with(op(aten.reshape.default, piece, list(op.shape(node))))
        start += length
    for chain in bucket:
        for link in reversed(chain):
            link.graph.erase_node(link)
