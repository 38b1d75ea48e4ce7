"""Which operators of a rank graph may write their result over an argument whose last use they are.

    add = aten.add(mm, x)     -->     add = aten.add_(mm, x)      where no later node needs the memory of mm
    s = comm.all_reduce(cat)  -->     s = comm.all_reduce(cat, in_place=True)

The graph itself stays functional; only the Python emitted from it writes in place. On a CPU new memory costs more than
a pointwise operator itself: large blocks come from the system page by page, each filled with zeros first.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import Node, values
from autopar.ir.operator_facts import is_composite, is_overload, is_view
from autopar.ir.sizes import is_expression
from autopar.mesh import Mesh

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
SYMMETRIC = (aten.add.Tensor, aten.mul.Tensor)  # the second argument's memory serves as well

FLAT = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip
DENSE = (*FLAT, operator.getitem, aten.t.default, aten.transpose.int, aten.permute.default)
ORDERED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.embedding.default)
STARTING = comm.targets(comm.STARTED)
REDUCING = comm.targets(("all_reduce", "start_all_reduce"))
FEWEST = 4096  # elements that a sum over ranks leaves where they are: a copy of fewer takes no time to speak of
KEEPING_ORDER = frozenset((*IN_PLACE, *FLAT, aten.cat.default, *(comm.ELEMENTWISE & comm.targets(comm.MOVING))))


def reused(graph: fx.Graph, mesh: Mesh) -> dict[Node, int]:
    """Node -> the position of the argument whose memory its result takes."""
    memory = _Memory(graph, mesh)
    found: dict[Node, int] = {}
    for node in graph.nodes:
        if (
            node.target in IN_PLACE
            and memory.is_free(node, 0)
            or node.target in REDUCING
            and memory.is_free(node, 0)
            and memory.is_large(node)
        ):
            found[node] = 0
        elif node.target in SYMMETRIC and not node.kwargs and memory.is_free(node, 1) and memory.is_ordered(node):
            found[node] = 1  # in the first argument's memory it has that one's strides, as it would in new memory
    return found


class _Memory:
    """The node that allocated each value of a graph, and the last reader of that memory."""

    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.mesh = mesh
        self.base: dict[Node, Node] = {}  # value -> the node whose memory it is in
        self.shared: set[Node] = set()  # bases whose memory is not, or may not be, the graph's own to the end
        self.starts: dict[Node, set[Node]] = {}  # base -> the collectives that read it until they are waited for
        self.last: dict[Node, Node] = {}  # base -> the last node that reads it
        self.ordered: set[Node] = set()  # values that are stored row by row, without gaps
        for node in graph.nodes:
            if node.op == "output":
                self.shared.update(self.base[source] for source in node.all_input_nodes)
            else:
                self._place(node)
            for source in node.all_input_nodes:
                self.last[self.base[source]] = node

    def _place(self, node: Node) -> None:
        sources = node.all_input_nodes
        passes_on = node.target is operator.getitem or node.target in comm.TARGETS or is_view(node.target)
        self.base[node] = self.base[sources[0]] if passes_on and sources else node
        alone = node.target in comm.TARGETS and self.mesh.size(str(comm.arguments_of(node)["axis"])) == 1
        if node.target in STARTING and not alone:
            for source in sources:
                self.starts.setdefault(self.base[source], set()).add(node)
            self.base[node] = node
        elif node.target in REDUCING and not alone:
            self.base[node] = node  # new memory, or that of an operand which nobody reads any more
        elif not sources or not passes_on and not _allocates(node.target):  # inputs, constants, maybe an argument
            self.shared.update(self.base[source] for source in (node, *sources))
        if node.target in ORDERED or node.target in KEEPING_ORDER and self.is_ordered(node):
            self.ordered.add(node)

    def is_ordered(self, node: Node) -> bool:
        """Whether all operands of ``node`` are stored row by row."""
        return self.ordered.issuperset(node.all_input_nodes)

    def is_free(self, node: Node, position: int) -> bool:
        """Whether the argument at ``position`` has the size of the result, and only ``node`` still needs its memory."""
        source = node.args[position]
        if not isinstance(source, fx.Node) or len(values(source)) != 1 or len(values(node)) != 1:
            return False
        base = self.base[source]
        others = [other for other in node.all_input_nodes if other is not source]
        if base in self.shared or self.starts.get(base, set()) - {node} or self.last[base] is not node:
            return False
        if any(self.base[other] is base for other in others):
            return False
        return self._size(source) == self._size(node) and self._is_dense(source)

    def is_large(self, node: Node) -> bool:
        """Whether a copy of ``node`` may take some time."""
        size = math.prod(self._size(node)[1])
        return is_expression(size) or size >= FEWEST

    def _size(self, node: Node) -> tuple[torch.dtype, tuple[int, ...]]:
        (kind,) = values(node)
        return kind.dtype, kind.layout.local_shape(self.mesh)

    def _is_dense(self, node: Node) -> bool:
        """Whether the memory of ``node`` holds each of its elements once, and nothing else."""
        while node is not self.base[node]:
            if node.target not in DENSE and node.target not in comm.TARGETS:
                return False
            node = node.all_input_nodes[0]
        return True


def _allocates(target: Any) -> bool:
    """Whether ``target`` certainly returns memory of its own; operators that torch composes of others may not."""
    return is_overload(target) and (not is_composite(target, in_python=False) or target is aten.linear.default)
