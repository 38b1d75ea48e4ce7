"""Make the loss of a microbatch a summand of the loss of the batch: what divides it is counted over the whole batch.

before, Plan(microbatches=2):
  x      = input                         : f32[4,3]
  mask   = input                         : f32[4]
  w      = param w                       : f32[3]
  y      = aten.mv(x, w)                 : f32[4]
  masked = aten.mul.Tensor(y, mask)      : f32[4]
  total  = aten.sum(masked)              : f32[]
  count  = aten.sum(mask)                : f32[]
  loss   = aten.div.Tensor(total, count) : f32[]
  return loss=loss
after:
  x       = input                           : f32[4,3]
  mask    = input                           : f32[4]
  w       = param w                         : f32[3]
  whole_0 = whole "0"                       : f32[]
  y       = aten.mv(x, w)                   : f32[4]
  masked  = aten.mul.Tensor(y, mask)        : f32[4]
  total   = aten.sum(masked)                : f32[]
  loss    = aten.div.Tensor(total, whole_0) : f32[]
  return loss=loss
  counts mesh()
  x     = input          : f32[4,3]
  mask  = input          : f32[4]
  count = aten.sum(mask) : f32[]
  return 0=count

``counts`` (``program.counts``) computes ``whole_0`` of one microbatch; before a step these are added up. A mean over
rows is multiplied by the microbatch's share of the rows. A loss that is not made of such sums and means (in-batch
negatives, a product of two means) is refused: :mod:`autopar.split.row_sums` says what each value is. With
``Plan(microbatch_weights="statistics")`` such a term of it is that of each microbatch, by its share of the rows.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from autopar import operators
from autopar.autodiff.partition import extract
from autopar.errors import InvariantError
from autopar.ir.batch import rows_of
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.label_counts import label_count
from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, output_node, set_values, value
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import drop_unused_constants
from autopar.ir.tables import SAME, SHARE, Input, InputKind, Output, OutputKind, join_key
from autopar.mesh import Mesh
from autopar.split.batch_statistics import refuse_statistics
from autopar.split.summands import Summands, described, summands

aten = torch.ops.aten


@graph_pass(
    requires=(nothing_is_placed,),
    when=lambda program: program.plan.microbatches > 1 and program.plan.microbatch_weights != "rows",
)
def weigh_microbatches(program: Program) -> Program:
    refuse_statistics(program)
    rows = rows_of(program)
    if rows is None:
        return program
    _count_labels(program)
    again = program.pins.of_rows
    found = summands(program, rows, None if again is None else lambda rows: _count_labels(again(rows)))
    joins = {join_key(program.outputs[place]): join for place, join in found.joins.items()}
    known = replace(program.pins, of_rows=None)  # it holds the model
    return replace(_Writer(program).run(found), joins=joins, pins=known)


def _count_labels(program: Program) -> Program:
    """The divisor of a cross-entropy, by operators that do not take the logits."""
    for node in list(program.graph.nodes):
        if node.target is not operator.getitem or node.args[1] != 1:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.target is operators.cross_entropy_sums:
            target, weight, ignored = cast(tuple[fx.Node, fx.Node | None, int], source.args[1:4])
            count = label_count(Builder(before=node), target, weight, ignored, value(node).dtype)
            node.replace_all_uses_with(count)
            program.graph.erase_node(node)
    return program


class _Writer:
    """Writes what a microbatch needs into its graph."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.inputs: list[Input] = []
        self.weighed: dict[Node, Node] = {}  # a mean over rows -> with its share
        self.wholes: dict[Node, Node] = {}  # a sum over rows of inputs -> the same of the whole batch

    def run(self, found: Summands) -> Program:
        program, returned = self.program, output_node(self.graph)
        for name in found.shares:
            self._weigh(self.nodes[name])
        for user, operand in found.shared:
            self._share(self.nodes[user], self._now(operand))
        for place, join in found.joins.items():
            if join == SAME and place == program.loss:
                self._share(returned, program.returned[place])
        for user, operand in found.wholes:
            self.nodes[user].replace_input_with(self._now(operand), self._whole(self._now(operand)))
        if not self.inputs:
            return program
        counts = self._counts()
        self.graph.eliminate_dead_code()
        kept = replace(program, inputs=(*program.inputs, *self.inputs), counts=counts)
        return drop_unused_constants(kept)

    def _now(self, name: str) -> Node:
        """The node called so before, with its share."""
        found: Node = self.weighed.get(self.nodes[name], self.nodes[name])
        return found

    def _weigh(self, node: Node) -> None:
        last: Node = self.weighed.get(node, node)
        op = Builder(after=last)
        users = list(last.users)
        self.weighed[node] = op(aten.mul.Tensor, last, op.cast(self._input(SHARE, SHARE), value(last).dtype))
        for user in users:
            user.replace_input_with(last, self.weighed[node])

    def _share(self, user: Node, operand: Node) -> None:
        op = Builder(before=user)
        share = op.cast(self._input(SHARE, SHARE), value(operand).dtype)
        user.replace_input_with(operand, op(aten.mul.Tensor, operand, share))

    def _whole(self, node: Node) -> Node:
        if node not in self.wholes:
            number = len(self.wholes)
            kind = replace(value(node), requires_grad=False)
            self.wholes[node] = self._input(f"whole_{number}", str(number), kind)
        return self.wholes[node]

    def _input(self, name: str, target: str, kind: Value | None = None) -> Node:
        """The placeholder of a value of the whole batch."""
        known = next((entry for entry in self.inputs if entry.target == target), None)
        if known is not None:
            found: Node = self.nodes[known.node]
            return found
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        set_values(node, kind or Value(torch.float64, Layout(())))
        self.inputs.append(Input(node.name, InputKind.WHOLE, target))
        self.nodes[node.name] = node
        return node

    def _counts(self) -> Program | None:
        """The program of one microbatch whose outputs, added up over all, are the values of the whole batch."""
        if not self.wholes:
            return None
        program, results = self.program, list(self.wholes)
        table = {entry.node: entry for entry in (*program.inputs, *self.inputs)}
        needed = ancestors(results)
        for node in needed:
            if node.name in table and table[node.name].kind is InputKind.WHOLE and table[node.name].target != SHARE:
                raise InvariantError(
                    f"{described(results[-1])} is a sum over the batch of what another sum over the batch divides\n"
                    "Way out: Plan(microbatches=1)."
                )
        sources = [
            node
            for node in self.graph.nodes
            if node.op == "placeholder" and (node in needed or table[node.name].kind is InputKind.INPUT)
        ]
        graph = extract(self.graph, sources, results)
        inputs = tuple(table[node.name] for node in sources)
        names = [entry.target for entry in inputs if entry.kind is InputKind.CONSTANT]
        constants = {name: program.constants[name] for name in names}
        outputs = tuple(Output(OutputKind.USER, str(number)) for number in range(len(results)))
        return replace(
            program, graph=graph, mesh=Mesh(), inputs=inputs, outputs=outputs, constants=constants, joins={},
            out_spec=None, static_outputs=(), counts=None,
        )  # fmt: skip
