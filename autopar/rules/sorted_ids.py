"""Ids in sorted order, and the ends of the rows of each id: the operands of grouped products."""

from __future__ import annotations

import operator

import torch
from torch import fx

from autopar.ir.fast_graph import calls_of
from autopar.ir.node import value
from autopar.ir.operator_facts import is_pure
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.rules.sorted_rows import SORTS, descending

aten = torch.ops.aten


def sorted_ids(program: Program, ends: fx.Node, count: int) -> fx.Node | None:
    """The sorted ids, if ``ends`` is the running sum of how often each id occurs."""
    total = _below_casts(ends)
    if total.target is not aten.cumsum.default:
        return None
    counts = _below_casts(operand(total))
    experts = value(ends).shape[0]
    bins = ((experts, 0, experts), (experts, 0, experts - 1))  # either way one for each id
    if counts.target is aten.histc.default and counts.args[1:] in bins:
        ids = _below_casts(operand(counts))
    elif (
        counts.target is aten.sum.dim_IntList
        and operand(counts).target is aten.one_hot.default
        and counts.args[1] == [0]
    ):
        ids = _below_casts(operand(operand(counts)))
    else:
        return None
    if value(ids).shape != (count,):
        return None
    source = operand(ids) if ids.target is operator.getitem and ids.args[1] == 0 else None
    if source is not None and source.target in SORTS:
        return None if descending(source) else ids
    sorts = [node for node in calls_of(program.graph, SORTS) if same_call(operand(node), ids)]
    items = [item for sort in sorts if not descending(sort) for item in sort.users if item.args[1] == 0]
    return items[0] if items else None


def same_call(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are the same call, written twice."""
    alike = a.op == b.op == "call_function" and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)
    return a is b or (alike and is_pure(a.target))


def _below_casts(node: fx.Node) -> fx.Node:
    while node.target is aten._to_copy.default:
        node = operand(node)
    return node
