"""Values that each pipeline stage computes for itself, where that takes less time than receiving them.

A parameter's cast, gather and views are always duplicated. So are values of inputs and constants alone, and values of
those and of small parameters, where computing them is cheaper than sending them:

    c_mask, labels                    masks, rotary tables, shifted labels
    embedding(p_bias, c_buckets)      t5's bias of relative positions: the table is smaller than the bias
    embedding(p_tokens, input_ids)    never: a look-up by inputs is the work of one stage
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from autopar.cost.roofline import Costs
from autopar.ir import collectives as comm
from autopar.ir.node import values
from autopar.ir.operator_facts import is_random, is_view
from autopar.ir.program import Program
from autopar.ir.tables import InputKind

aten = torch.ops.aten

FORMS = (  # of a parameter, whatever it costs: gathered parameters never travel
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.reshape.default,
    operator.getitem, *comm.IDENTITIES, *comm.GATHERS, *comm.CUTS,
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """The derivation of a value that depends on placeholders only: calls, parameters, and whether inputs are among
    them.

    ``form``: whether the value is a parameter, cast or gathered.
    """

    nodes: frozenset[fx.Node] = frozenset()
    parameters: frozenset[fx.Node] = frozenset()
    inputs: bool = False
    form: bool = False


@dataclass
class _Search:
    program: Program
    costs: Costs
    made: dict[fx.Node, Derived] = field(default_factory=dict)
    chosen: set[fx.Node] = field(default_factory=set)

    def start(self) -> None:
        """Enter the placeholders; of the buffers, those that no step changes."""
        updated = self.program.written_buffers
        table = {entry.node: entry for entry in self.program.inputs}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            entry = table[node.name]
            if entry.kind is InputKind.PARAMETER:
                self.made[node] = Derived(parameters=frozenset((node,)), form=True)
            elif not (entry.kind is InputKind.BUFFER and entry.target in updated):
                self.made[node] = Derived(inputs=entry.kind is InputKind.INPUT)

    def visit(self, node: fx.Node) -> None:
        found = self._made(node)
        if found is None:
            return
        if found.form or self._pays(node, found):
            self.made[node] = found
            self.chosen |= found.nodes
        elif not found.parameters:  # a value computed from it may be small again: a count of labels
            self.made[node] = found

    def _made(self, node: fx.Node) -> Derived | None:
        sources = [self.made.get(source) for source in node.all_input_nodes]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources) or is_random(node.target):
            return None
        nodes = frozenset((node,)).union(*(source.nodes for source in known))
        parameters = frozenset[fx.Node]().union(*(source.parameters for source in known))
        inputs = any(source.inputs for source in known)
        form = bool(known) and known[0].form and len(known) == 1 and (node.target in FORMS or is_view(node.target))
        if inputs and any(source.form for source in known):
            return None  # a look-up, a projection of inputs
        return Derived(nodes, parameters, inputs, form)

    def _pays(self, node: fx.Node, found: Derived) -> bool:
        size = self.costs.bytes([node])
        if found.parameters and self.costs.bytes(found.parameters) > size:
            return False
        ways = 2 if any(kind.requires_grad for kind in values(node)) else 1  # its gradient comes back
        return sum(map(self.costs.both, found.nodes)) <= ways * self.costs.sending(size)


def duplicated_nodes(program: Program, costs: Costs) -> frozenset[fx.Node]:
    """The calls that every stage computes for itself if it needs them; with a call, all that it is computed from."""
    search = _Search(program, costs)
    search.start()
    for node in program.graph.nodes:
        if node.op == "call_function":
            search.visit(node)
    found = search.chosen
    for node in program.graph.nodes:  # the parts of a tuple come with it
        if node.target is operator.getitem and node.all_input_nodes[0] in found:
            found.add(node)
    return frozenset(found)
