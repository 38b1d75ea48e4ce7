"""The regions of a forward graph in which backward may recompute values, and the cheapest choice in each of them.

A region is one run through a repeated block, or the nodes between two products outside of all blocks. Values that
another region uses are kept if backward needs them, so recomputation never leads from one region into the next.
Each region is solved by itself (``min_cut``); regions of equal structure are solved once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from fractions import Fraction

import torch
from torch import fx

from autopar.autodiff.differentiate import is_gathered
from autopar.autodiff.min_cut import Choice, Item, Region, fewest_bytes, frontier
from autopar.autodiff.partition import Joint, Recompute, saved_nodes
from autopar.cost.flops import flops
from autopar.cost.machine import BANDWIDTH, FLOPS
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import Value, values
from autopar.ir.operator_facts import is_free, is_operator, is_product, is_random, packet_of
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import InputKind
from autopar.ir.traffic import moved_bytes
from autopar.operators import MERGE
from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.routing import RECEIVED_IDS, ROUTE_ROWS, ROW_SIZES

aten = torch.ops.aten
# what is sent in forward and in backward is not sent a third time: keys and values of a ring, rows of experts;
# and the load is counted once
SENT_TWICE = {
    MERGE, comm.OPS.shift.default, *comm.ROUTES, ROUTE_ROWS, ROW_SIZES, RECEIVED_IDS, SEAT_ROWS, comm.OPS.tally.default,
}  # fmt: skip
SORTS = (aten.sort, aten.argsort, aten.topk)  # choices of rows: a recomputed one must choose the same
OUTSIDE = ""  # of all repeated blocks
Place = tuple[str, int]  # a repeated block, or OUTSIDE, and the number of the run through it


class Regions:
    """The values of one forward graph that backward needs, by the regions in which they may be recomputed."""

    def __init__(self, program: Program, joint: Joint, free: Recompute) -> None:
        self.program, self.joint, self.free = program, joint, free
        self.parameters = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
        self.order = {node: position for position, node in enumerate(joint.graph.nodes)}
        self.places = places_of(joint, self.parameters)
        self.saved = saved_nodes(joint, free)
        self.twice = ancestors(joint.gradients, stop=self.saved)  # the nodes that backward computes now
        self.held = {node for node in self.saved if self._stays(node)}
        found: dict[Place, list[fx.Node]] = defaultdict(list)
        for node in self.saved:
            if node not in self.held:
                found[self.places[node]].append(node)
        self.nodes = [self._made_of(place, needed) for place, needed in found.items()]
        self.regions = [self._region(place, nodes) for place, nodes in zip(found, self.nodes)]

    def recomputed(self) -> set[fx.Node]:
        """The nodes that backward is to recompute."""
        budget = self.program.plan.recompute
        found = list(map(fewest_bytes, self.regions)) if isinstance(budget, str) else self._within(Fraction(budget))
        pairs = list(zip(self.nodes, found))
        kept = {nodes[position] for nodes, choice in pairs for position in choice.kept}
        return {nodes[position] for nodes, choice in pairs for position in choice.recomputed} - kept

    def _within(self, share: Fraction) -> list[Choice]:
        """Step by step, the choices that save most bytes for their work first, until no more than ``share`` is kept."""
        frontiers = list(map(frontier, self.regions))
        steps = [
            (Fraction(after.work - before.work, before.bytes - after.bytes), number, position + 1)
            for number, choices in enumerate(frontiers)
            for position, (before, after) in enumerate(zip(choices, choices[1:]))
        ]
        found = [choices[0] for choices in frontiers]
        constant = sum(map(self._bytes, self.held))
        budget = share * sum(map(self._bytes, self.saved))
        kept = constant + sum(choice.bytes for choice in found)
        for _, number, position in sorted(steps):
            if kept <= budget:
                break
            kept -= found[number].bytes - frontiers[number][position].bytes
            found[number] = frontiers[number][position]
        return found

    # ------------------------------------------------------------ regions

    def _stays(self, node: fx.Node) -> bool:
        """Whether a value that backward needs is kept in every choice: another region uses it."""
        if node in self.joint.outputs or self._is_at_hand(node):
            return True
        return any(self._may_again(user) for user in self._consumers(node) if self.places[user] != self.places[node])

    def _consumers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that forward computes from ``node``, or from a view of it."""
        for user in node.users:
            if user in self.joint.forward:
                yield from self._consumers(user) if is_free(user) else (user,)

    def _made_of(self, place: Place, needed: Sequence[fx.Node]) -> list[fx.Node]:
        """``needed`` and all values that they can be computed from, in order, from those of other regions on."""
        found = ancestors(needed, through=lambda node: self._is_within(place, node))
        return sorted(found, key=self.order.__getitem__)

    def _is_within(self, place: Place, node: fx.Node) -> bool:
        """Whether ``node`` may be recomputed in the region of ``place``."""
        if node in self.held or self._is_at_hand(node):
            return False
        return self.free(node) or (self.places[node] == place and self._may_again(node))

    def _region(self, place: Place, nodes: Sequence[fx.Node]) -> Region:
        positions = {node: position for position, node in enumerate(nodes)}
        needed = set(self.saved) - self.held

        def item(node: fx.Node) -> Item:
            if node in self.held or self._is_at_hand(node):
                return Item((), 0, None)
            size = None if self.free(node) or len(values(node)) != 1 else self._bytes(node)
            if not self._is_within(place, node):
                return Item((), size, None, node in needed and self.places[node] == place)
            operands = tuple(positions[source] for source in node.all_input_nodes)
            return Item(operands, size, self._work(node), node in needed)

        return tuple(map(item, nodes))

    # ------------------------------------------------------------ values

    def _is_at_hand(self, node: fx.Node) -> bool:
        """Whether ``node`` is a parameter, an input, or a parameter that is gathered once for the whole step."""
        return node.op == "placeholder" or (is_gathered(node, self.parameters) and not self.free(node))

    def _may_again(self, node: fx.Node) -> bool:
        """Whether the plan lets backward recompute ``node``."""
        if node.target in SENT_TWICE or self._is_buffer(node):
            return False
        block, _ = self.places[node]
        everything = self.program.plan.recompute != "selective" and block != OUTSIDE
        return not is_random(node.target) and (everything or not _is_costly(node) or self._joins_sequence(node))

    def _joins_sequence(self, node: fx.Node) -> bool:
        """Whether ``node`` gathers, over ``tp``, the sequence that ``Plan(sequence="megatron")`` splits between blocks.

        Kept whole these operands are as large on every rank as without the split (Korthikanti et al. 2022, 4.2.2).
        """
        splits = self.program.plan.sequence == "megatron"
        return splits and node.target in comm.GATHERS and comm.axes_over(node) == {"tp"}

    def _is_buffer(self, node: fx.Node) -> bool:
        """Whether ``node`` is a buffer of rows of experts that has been exchanged."""
        if node.target is not comm.OPS.all_to_all.default:
            return False
        (source,) = node.all_input_nodes
        while is_free(source):
            (source,) = source.all_input_nodes
        return source.target is PICK_ROWS or any(user.target is PICK_ROWS for user in self._consumers(node))

    def _bytes(self, node: fx.Node) -> int:
        """The bytes that keeping a value takes on one rank; none for a value that is available anyway."""
        if node in self.joint.outputs or self._is_at_hand(node):
            return 0
        return sum(math.prod(self._shape(kind)) * kind.dtype.itemsize for kind in values(node))

    def _work(self, node: fx.Node) -> int:
        """Operations of a call on one rank; bytes that it sends count as the operations possible in that time."""
        if node in self.twice:
            return 0
        work, name = flops(node, self._shape), comm.moving(node.target)
        if name is not None:
            sent = sum(math.prod(self._shape(kind)) * kind.dtype.itemsize for kind in values(node.all_input_nodes[0]))
            work += round(moved_bytes(name, self.program.mesh.size(str(node.args[1])), sent) * FLOPS / BANDWIDTH)
        return work

    def _shape(self, kind: Value) -> tuple[int, ...]:
        return kind.layout.local_shape(self.program.mesh)


def _is_costly(node: fx.Node) -> bool:
    """Whether recomputing ``node`` costs more than one walk through memory, or could give another result."""
    sends = comm.moving(node.target) is not None
    return is_product(node.target) or sends or (is_operator(node) and packet_of(node) in SORTS)


def places_of(joint: Joint, parameters: Set[str]) -> dict[fx.Node, Place]:
    """The region of each node of forward, except free ones.

    A repeated block is run through again where a product takes a weight for the second time (layers that share their
    weights). Outside of repeated blocks, a region ends before each product, so that it cannot reach from the first
    layer to the last.
    """
    found: dict[fx.Node, Place] = {}
    runs: Counter[str] = Counter()
    used: dict[str, set[fx.Node]] = defaultdict(set)
    for node in joint.graph.nodes:
        if node not in joint.forward or node.op != "call_function" or is_free(node):
            continue
        block = block_of(node) if is_repeated(block_of(node)) else OUTSIDE
        if is_product(node.target):
            weights = {source for source in node.all_input_nodes if _is_weight(source, parameters)}
            if block == OUTSIDE or weights & used[block]:
                runs[block] += 1
                used[block].clear()
            used[block] |= weights
        found[node] = block, runs[block]
    return found


def _is_weight(node: fx.Node, parameters: Set[str]) -> bool:
    """Whether ``node`` is a parameter, a view of one, or a gathered one."""
    while len(node.all_input_nodes) == 1 and (is_free(node) or is_gathered(node, parameters)):
        (node,) = node.all_input_nodes
    return node.op == "placeholder" and node.name in parameters
