"""Let each expert of a sum over experts compute the rows that chose it, by one product with all weights stacked.

A model that goes through its experts one after the other is traced with all rows for each of them, and zeros for those
that did not choose it. Where the experts differ in their weights only, their calls become one call, and their products
one ``autopar.expert_linear``. Others stay as they are: as exact, and each expert computes all rows.

before:
  a        = param experts.0.weight                      : f32[6,6]
  b        = param experts.1.weight                      : f32[6,6]
  x        = input x                                     : f32[5,6]
  scores   = input scores                                : f32[5,2]
  ids      = aten.argmax(scores, 1)                      : i64[5]
  first    = aten.eq.Scalar(ids, 0)                      : bool[5]
  column   = aten.reshape(first, [5, 1])                 : bool[5,1]
  others   = aten.logical_not(column)                    : bool[5,1]
  up       = aten.linear(x, a)                           : f32[5,6]
  act      = aten.silu(up)                               : f32[5,6]
  kept     = aten.masked_fill.Scalar(act, others, 0)     : f32[5,6]
  one      = aten.add.Tensor(x, kept)                    : f32[5,6]
  second   = aten.eq.Scalar(ids, 1)                      : bool[5]
  column_1 = aten.reshape(second, [5, 1])                : bool[5,1]
  others_1 = aten.logical_not(column_1)                  : bool[5,1]
  up_1     = aten.linear(x, b)                           : f32[5,6]
  act_1    = aten.silu(up_1)                             : f32[5,6]
  kept_1   = aten.masked_fill.Scalar(act_1, others_1, 0) : f32[5,6]
  both     = aten.add.Tensor(one, kept_1)                : f32[5,6]
  return both
after:
  a             = param experts.0.weight                   : f32[6,6]
  b             = param experts.1.weight                   : f32[6,6]
  x             = input x                                  : f32[5,6]
  scores        = input scores                             : f32[5,2]
  ids           = aten.argmax(scores, 1)                   : i64[5]
  stack         = aten.stack([a, b])                       : f32[2,6,6]
  transpose     = aten.transpose.int(stack, 1, 2)          : f32[2,6,6]
  expert_linear = autopar.expert_linear(x, transpose, ids) : f32[5,6]
  silu          = aten.silu(expert_linear)                 : f32[5,6]
  add           = aten.add.Tensor(x, silu)                 : f32[5,6]
  return add
"""

from __future__ import annotations

import math

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, placeholders_match_inputs
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, remove_unused, substitute
from autopar.rules.choices import experts_of
from autopar.rules.expert_terms import Sum, expert_sums
from autopar.rules.stacked_calls import Stacked, Unlike

aten = torch.ops.aten


@graph_pass(ensures=(every_value_has_a_layout, placeholders_match_inputs))
def stack_experts(program: Program) -> Program:
    for found in expert_sums(program.graph):
        try:
            new = _stacked(found)
        except Unlike:
            continue
        substitute(found.total, new)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _stacked(found: Sum) -> fx.Node:
    """The sum with one call for all experts. Raises Unlike."""
    op, experts, copies = Builder(before=found.total), len(found.terms), found.terms[0].copies
    rows = tuple(term.rows for term in found.terms)
    count = value(rows[0]).shape[0] * copies
    ids = op.reshape(found.ids, count)
    candidates = experts_of(found.ids)
    bounded = candidates is not None and candidates <= experts
    unknown = None if bounded else _beyond(op, ids, experts)
    if unknown is not None:
        ids = op(aten.masked_fill.Scalar, ids, unknown, experts)
    given = Stacked(op, found.ids, ids, bounded, copies).rows(rows, 0)
    if unknown is not None:
        given = op(aten.masked_fill.Scalar, given, op.reshape(unknown, count, *[1] * (len(value(given).shape) - 1)), 0)
    shape = value(found.total).shape
    choices = math.prod(value(given).shape) // max(math.prod(shape), 1)
    if choices > 1:
        parts = op.reshape(given, count // choices, choices, *value(given).shape[1:])
        given = op(aten.sum.dim_IntList, parts, [1])
    given = op.reshape(given, *shape)
    return given if found.first is None else op(aten.add.Tensor, found.first, given)


def _beyond(op: Builder, ids: fx.Node, experts: int) -> fx.Node:
    """Which ids are those of no expert."""
    return op(aten.logical_or.default, op(aten.lt.Scalar, ids, 0), op(aten.ge.Scalar, ids, experts))
