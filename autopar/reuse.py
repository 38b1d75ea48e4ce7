"""Which operators of a rank graph may write their result over an argument that dies there.

    add = aten.add(mm, x)     -->    add = aten.add_(mm, x)      where nothing needs the memory of mm any more

The graph itself stays functional; only the emitted Python writes in place. Fresh memory is what pointwise operators
cost on CPUs: the kernel of the operating system hands it out in zeroed pages, which takes longer than the sum.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar import comm
from autopar.mesh import Mesh
from autopar.program import Node, output_node, values
from autopar.recorder import is_view

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addmm.default: aten.addmm_.default,
    aten.div.Scalar: aten.div_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.exp.default: aten.exp_.default,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.rsqrt.default: aten.rsqrt_.default,
    aten.sqrt.default: aten.sqrt_.default,
    aten.sub.Tensor: aten.sub_.Tensor,
}
SYMMETRIC = (aten.add.Tensor, aten.mul.Tensor)  # the second argument's memory will do as well

DENSE = (operator.getitem, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default,
         aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim)  # fmt: skip
FLAT = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
ORDERED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.embedding.default)


def reused(graph: fx.Graph, mesh: Mesh) -> dict[Node, int]:
    """Node -> the position of the argument whose memory its result takes."""
    memory = _Memory(graph, mesh)
    found: dict[Node, int] = {}
    for node in graph.nodes:
        if node.target not in IN_PLACE:
            continue
        for position in (0, 1) if node.target in SYMMETRIC else (0,):
            if memory.is_free(node, position) and (position == 0 or memory.keeps_order(node)):
                found[node] = position
                break
    return found


class _Memory:
    """Who allocated each value of a graph, and who needs that last."""

    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.mesh = mesh
        self.base: dict[Node, Node] = {}
        self.shared: set[Node] = set()  # bases that somebody else may hold, or that are not what they seem
        self.last: dict[Node, Node] = {}  # base -> the last node that reads it
        self.ordered: set[Node] = set()  # values that lie row by row
        for node in graph.nodes:
            if node.op == "output":
                self.shared.update(self.base[source] for source in node.all_input_nodes)
                continue
            self._place(node)
            if self._is_ordered(node):
                self.ordered.add(node)
            for source in node.all_input_nodes:
                self.last[self.base[source]] = node

    def _place(self, node: Node) -> None:
        sources = node.all_input_nodes
        passed_on = node.target is operator.getitem or node.target in comm.TARGETS or is_view(node.target)
        self.base[node] = self.base[sources[0]] if passed_on and sources else node
        if node.op == "placeholder" or not sources or not passed_on and not _allocates(node.target):
            self.shared.update(self.base[source] for source in (node, *sources))

    def _is_ordered(self, node: Node) -> bool:
        if node.target in ORDERED or node.target is comm.OPS.all_reduce.default:
            return True
        if node.target is aten.clone.default:
            return node.kwargs.get("memory_format") is torch.contiguous_format or node.args[0] in self.ordered
        pointwise = node.target in IN_PLACE or node.target is aten.cat.default
        return (pointwise or node.target in FLAT) and all(source in self.ordered for source in node.all_input_nodes)

    def is_free(self, node: Node, position: int) -> bool:
        """Whether the argument at ``position`` has the size of the result, and nothing but ``node`` needs its memory."""
        source = node.args[position]
        if not isinstance(source, fx.Node) or len(values(source)) != 1 or len(values(node)) != 1:
            return False
        base, others = self.base[source], [other for other in node.all_input_nodes if other is not source]
        if base in self.shared or self.last[base] is not node or any(self.base[other] is base for other in others):
            return False
        return self._size(source) == self._size(node) and self._is_dense(source)

    def keeps_order(self, node: Node) -> bool:
        """Whether the result lies in memory as it would in memory of its own."""
        return all(source in self.ordered for source in node.all_input_nodes)

    def _size(self, node: Node) -> tuple[torch.dtype, tuple[int, ...]]:
        (kind,) = values(node)
        return kind.dtype, kind.layout.local_shape(self.mesh)

    def _is_dense(self, node: Node) -> bool:
        """Whether each element of the memory behind ``node`` is one of its elements."""
        while node is not self.base[node]:
            if node.target not in DENSE and node.target not in comm.TARGETS:
                return False
            node = node.all_input_nodes[0]
        return True


def _allocates(target: Any) -> bool:
    """Whether ``target`` is known to return memory of its own: not so for what torch composes of other operators."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not composed or target is aten.linear.default
