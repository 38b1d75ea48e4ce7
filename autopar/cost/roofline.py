"""The time of an operator on one rank, from local shapes alone: a roofline (Williams et al. 2009).

A call takes as long as its arithmetic or its memory traffic, whichever is longer; a collective as long as its bytes
need over a link. The backward of a product is one more product for each operand that gets a gradient. The backward of
any other operator moves about twice the bytes of its forward.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.cost.flops import flops
from autopar.cost.machine import ACCELERATOR, Machine
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import Value, values
from autopar.ir.operator_facts import is_operator, is_product, is_view, packet_of
from autopar.ir.program import Program
from autopar.ir.traffic import moved_bytes
from autopar.mesh import Mesh
from autopar.operators import ATTENTION, TILE, masked_attention
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.operators.embedding import embedding_rows

aten = torch.ops.aten

TABLES = (aten.embedding, EMBEDDING_BAGS.overloadpacket, embedding_rows)  # tables of which a few rows are read
PICKS = (aten.index, aten.index_select, aten.gather, aten.slice, aten.select, aten.narrow)
ATTENTIONS = (aten.scaled_dot_product_attention, masked_attention, ATTENTION.overloadpacket, TILE.overloadpacket)
PASSES_OVER_SCORES = 10  # of attention by parts: mask, softmax and their copies, each read and written
ATTENTION_BACKWARD = 2.5  # five products for two: the scores once more (Dao et al. 2022)


@dataclass(frozen=True)
class Costs:
    """Seconds, operations and bytes of the calls of one program, on one rank."""

    program: Program
    machine: Machine = ACCELERATOR

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    def forward(self, node: fx.Node) -> float:
        """Seconds of one run of forward."""
        if node.op != "call_function" or node.target is operator.getitem or is_view(node.target):
            return 0.0
        name = comm.TARGETS.get(node.target)
        if name is not None:
            return self._collective(name, node, self.bytes(node.all_input_nodes[:1]))
        return max(self.flops(node) / self.machine.flops, self.traffic(node) / self.machine.memory)

    def both(self, node: fx.Node) -> float:
        """Seconds of forward and backward, including the values that the plan recomputes in between."""
        once = self.forward(node)
        if not any(kind.requires_grad for kind in values(node)) or node.target is operator.getitem:
            return once
        if node.target in comm.TARGETS:
            dual = comm.COLLECTIVES[comm.TARGETS[node.target]].dual
            return once + self._collective(dual, node, self.bytes([node]))
        return once * (1 + self._share_recomputed(node)) + self._backward(node, once)

    def flops(self, node: fx.Node) -> int:
        """Operations of one run of forward."""
        return flops(node, self._local)

    def bytes(self, nodes: Iterable[fx.Node]) -> int:
        """Bytes of the outputs of ``nodes``, as one rank holds them."""
        return sum(math.prod(self._local(kind)) * kind.dtype.itemsize for node in nodes for kind in values(node))

    def scores(self, node: fx.Node) -> int:
        """Bytes of the scores of an attention, (..., queries, keys)."""
        queries, keys = (values(source)[0] for source in node.all_input_nodes[:2])
        return math.prod(self._local(queries)[:-1]) * self._local(keys)[-2] * queries.dtype.itemsize

    def sending(self, size: float) -> float:
        """Seconds that a message of ``size`` bytes is under way."""
        return self.machine.latency + size / self.machine.link

    def _local(self, kind: Value) -> tuple[int, ...]:
        return kind.layout.local_shape(self.mesh)

    def traffic(self, node: fx.Node) -> int:
        """Bytes that one run of forward reads and writes."""
        sources = node.all_input_nodes
        if _kind(node) in (*TABLES, *PICKS):
            return 2 * self.bytes([node]) + self.bytes(sources[1:])
        if by_parts(node):
            return self.bytes([node, *sources]) + PASSES_OVER_SCORES * self.scores(node)
        return self.bytes([node, *sources])

    def _backward(self, node: fx.Node, once: float) -> float:
        packet = _kind(node)
        if packet in TABLES:
            return once + self.bytes(node.all_input_nodes[:1]) / self.machine.memory  # zeros, most of them
        if packet in ATTENTIONS:
            return once * ATTENTION_BACKWARD
        if is_product(node.target):
            kinds = [kind for source in node.all_input_nodes for kind in values(source)]
            return once * sum(kind.requires_grad and len(kind.shape) > 1 for kind in kinds)
        return 2 * once

    def _collective(self, name: str, node: fx.Node, size: int) -> float:
        if name not in comm.MOVING or comm.is_idle(node, self.mesh):
            return 0.0
        moved = moved_bytes(name, self.mesh.size(comm.arguments_of(node)["axis"]), size)
        return self.machine.latency + moved / self.machine.link if moved else 0.0

    def _share_recomputed(self, node: fx.Node) -> float:
        """How much of forward runs a second time (``Plan.recompute``)."""
        how, product = self.program.plan.recompute, is_product(node.target)
        if how == "none" or how == "selective" and product:
            return 0.0
        if how == "selective":
            return 1.0
        return (1.0 if isinstance(how, str) else 1.0 - how) if is_repeated(block_of(node)) else 0.0


def _kind(node: fx.Node) -> Any:
    """The operator without its overload; an operator of ours may be a function."""
    return packet_of(node) if is_operator(node) else node.target


def by_parts(node: fx.Node) -> bool:
    """Whether ``node`` is an attention that materialises its scores (:mod:`autopar.operators.attention`)."""
    if not is_operator(node) or packet_of(node) is not aten.scaled_dot_product_attention:
        return False
    arguments = dict(zip(("attn_mask", "dropout_p"), node.args[3:])) | node.kwargs
    mask, dropout = arguments.get("attn_mask"), arguments.get("dropout_p", 0.0)
    return isinstance(mask, fx.Node) and values(mask)[0].requires_grad or bool(dropout)
