"""The values that backward keeps from forward, estimated on the forward program before there is a backward pass.

The estimate serves the choice of stages. ``differentiate`` and ``recompute_activations`` later decide on the real
graphs. Products keep their operands, norms their input, other functions the value in which their derivative is
written; views, sums and collectives keep nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Set

import torch
from torch import fx

from autopar.cost.roofline import Costs, by_parts
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import values
from autopar.ir.operator_facts import Kept, facts_of, is_operator, is_product, is_view, packet_of

aten = torch.ops.aten

PERMUTATIONS = (aten.transpose, aten.permute, aten.expand, aten.movedim, aten.swapaxes)


class SavedValues:
    """The values that the backward passes of calls keep. ``apart``: parameters that were cast or gathered."""

    def __init__(self, costs: Costs, apart: Set[fx.Node]) -> None:
        self.costs, self.apart = costs, apart
        self.how = costs.program.plan.recompute

    def kept_by(self, node: fx.Node) -> frozenset[fx.Node]:
        """The values that backward of ``node`` needs, except parameters and values that are free to recompute."""
        if not any(kind.requires_grad for kind in values(node)):
            return frozenset()
        found = (memory_of(value) for value in operands_kept(node))
        there = (value for value in found if value.op != "placeholder" and value not in self.apart)
        return frozenset(stays for value in there for stays in self._made_from(value))

    def inner_bytes(self, node: fx.Node) -> int:
        """Bytes that backward of ``node`` keeps beyond the values of this graph.

        These are the scores of an attention after softmax, and the marks of rows that see nothing.
        """
        if not by_parts(node) or self.how == "full" and _region(node):
            return 0
        return self.costs.scores(node) * (1 if self.how == "selective" else 2)

    @property
    def share(self) -> float:
        """The share of the bytes of these values that the plan lets backward keep."""
        return 1.0 if isinstance(self.how, str) else float(self.how)

    def _made_from(self, value: fx.Node) -> Iterator[fx.Node]:
        """``value`` itself, or the kept values from which backward recomputes it."""
        wanted, seen = [value], set[fx.Node]()
        while wanted:
            node = wanted.pop()
            if node in seen or node in self.apart or node.op != "call_function":
                continue
            seen.add(node)
            if self._stays(node):
                yield node
            else:
                wanted += map(memory_of, node.all_input_nodes)

    def _stays(self, node: fx.Node) -> bool:
        if self.how not in ("full", "selective") or self.how == "full" and not _region(node):
            return True
        if any(_region(user) != _region(node) for user in node.users):
            return True
        return self.how == "selective" and (is_product(node.target) or node.target in comm.TARGETS)


def _region(node: fx.Node) -> str:
    """The repeated block that contains ``node``; nodes outside all blocks share one region."""
    block = block_of(node)
    return block if is_repeated(block) else ""


def memory_of(node: fx.Node) -> fx.Node:
    """The value whose memory ``node`` shows: for a view, the value it views."""
    while node.op == "call_function" and (_is_view(node) or node.target in comm.IDENTITIES):
        node = node.all_input_nodes[0]
    return node


def _unrepeated(node: fx.Node) -> fx.Node:
    """The heads before their repetition in ``node`` (``ir.repeated_heads``)."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    repeats = is_operator(node) and packet_of(node) is aten.reshape
    return source if repeats and is_operator(source) and packet_of(source) is aten.expand else node


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0].target)
    if is_operator(node) and packet_of(node) is aten.reshape:
        source = node.all_input_nodes[0]
        return not (is_operator(source) and packet_of(source) in PERMUTATIONS)  # then reshape copies
    return is_view(node.target)


def operands_kept(node: fx.Node) -> list[fx.Node]:
    """What torch's backward of ``node`` takes from forward, by the table of ``operator_facts``."""
    sources = node.all_input_nodes
    if node.target is operator.getitem or node.target in comm.TARGETS or is_view(node.target):
        return []
    if not is_operator(node) and not is_product(node.target):  # losses keep what they normalise
        return [source for source in sources if any(kind.requires_grad for kind in values(source))]
    return KEPT[facts_of(node.target).kept](node, sources)


def _by_attention(node: fx.Node, sources: Sequence[fx.Node]) -> list[fx.Node]:
    return [*map(_unrepeated, sources[:3]), *sources[3:], *(() if by_parts(node) else (node,))]


def _by_condition(node: fx.Node, sources: Sequence[fx.Node]) -> list[fx.Node]:
    return [source for source in sources if not values(source)[0].dtype.is_floating_point]


def _by_factors(node: fx.Node, sources: Sequence[fx.Node]) -> list[fx.Node]:
    return [a for a in sources if any(values(b)[0].requires_grad for b in sources if b is not a)]


KEPT: dict[Kept, Callable[[fx.Node, Sequence[fx.Node]], list[fx.Node]]] = {
    Kept.OPERANDS: lambda node, sources: list(sources),
    Kept.QUOTIENT: lambda node, sources: list(sources) if len(sources) > 1 else [],
    Kept.FACTORS: _by_factors,
    Kept.CONDITION: _by_condition,
    Kept.RESULT: lambda node, sources: [node],
    Kept.ATTENTION: _by_attention,
    Kept.NOTHING: lambda node, sources: [],
}
