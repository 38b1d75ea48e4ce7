"""Rewrite layers of experts so that rows stay in the order of the tokens, each multiplied with its expert's matrix.

Grouped products (rows sorted by expert, and the ends of each expert's rows), products with gathered weights
(``weight[ids]``, one matrix for each row) and experts that run for every token, where only what the chosen ones give
counts (``autopar/experts/``), become ``autopar.expert_linear``. Sorting and its inverse vanish where each row between
them is treated alone: the batch can then be cut anywhere. A row for several experts is not repeated.
``decisions["experts"]`` says which layers were found, and why others were not.

before:
  w        = param w                                          : f32[4,8,6]
  x        = input x                                          : f32[5,8]
  ids      = input ids                                        : i64[10]
  sort     = aten.sort(ids)                                   : (i64[10], i64[10])
  expert   = sort[0]                                          : i64[10]
  order    = sort[1]                                          : i64[10]
  token    = aten.floor_divide(order, 2)                      : i64[10]
  rows     = aten.index.Tensor(x, [token])                    : f32[10,8]
  floats   = aten._to_copy(expert, dtype=f32)                 : f32[10]
  histc    = aten.histc(floats, 4, 0, 3)                      : f32[4]
  ends     = aten.cumsum(histc, 0, dtype=i32)                 : i32[4]
  product  = aten._grouped_mm(rows, w, ends)                  : f32[10,6]
  act      = aten.relu(product)                               : f32[10,6]
  empty    = aten.empty_like(order)                           : i64[10]
  arange   = aten.arange(10)                                  : i64[10]
  inverse  = aten.index_put(empty, [order], arange)           : i64[10]
  result   = aten.index.Tensor(act, [inverse])                : f32[10,6]
  return result
after:
  w              = param w                              : f32[4,8,6]
  x              = input x                              : f32[5,8]
  ids            = input ids                            : i64[10]
  expert_linear  = autopar.expert_linear(x, w, ids)     : f32[10,6]
  act            = aten.relu(expert_linear)             : f32[10,6]
  return act
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from autopar.experts.dense import FORM as DENSE
from autopar.experts.dense import make_sparse
from autopar.experts.report import EXPERTS, decisions_on_experts
from autopar.ir.builder import Builder
from autopar.ir.fast_graph import calls_of
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, placeholders_match_inputs
from autopar.ir.node import value
from autopar.ir.operator_facts import bare_name
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, operand, remove_unused, substitute
from autopar.operators.experts import EXPERT_LINEAR
from autopar.rules.gathered_products import GatheredProduct, gathered_product
from autopar.rules.sorted_ids import same_call, sorted_ids
from autopar.rules.sorted_rows import PERMUTES, SortedRows, is_arange
from autopar.split.flow import weights_of

aten = torch.ops.aten

GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")
REPEAT = aten.repeat_interleave.self_int
VIEWS = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}


@graph_pass(ensures=(every_value_has_a_layout, placeholders_match_inputs))
def recognise_experts(program: Program) -> Program:
    outcomes = make_sparse(program)
    forms = {product: DENSE for outcome in outcomes for product in outcome.products}
    weights = weights_of(program)
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node in forms:
            continue
        if (new := _from_grouped(program, node)) is not None:
            forms[new] = "grouped products"
            substitute(node, new)
        elif (product := gathered_product(node, program.mesh, weights)) is not None:
            found, new = _multiplied(node, product)
            forms[found] = "gathered weights"
            substitute(node, new)
    remove_unused(program.graph)
    for node in calls_of(program.graph, PERMUTES):
        region = SortedRows.made_by(program, node)
        if region is not None and region.closed:
            region.remove()
    known: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.target is EXPERT_LINEAR:
            ids = operand(node, 2)
            known += [] if any(same_call(ids, other) for other in known) else [ids]
            shared = next(other for other in known if same_call(ids, other))
            node.args = (_unrepeated(node), node.args[1], shared)
    remove_unused(program.graph)
    program = drop_unused_constants(program)
    decisions = decisions_on_experts(program, forms, outcomes)
    return replace(program, decisions={**program.decisions, EXPERTS: decisions}) if decisions else program


def _unrepeated(node: fx.Node) -> fx.Node:
    """The rows of an expert_linear, without their repetition: the operator repeats them itself."""
    rows, ids = operand(node), operand(node, 2)
    repeated = rows.target is REPEAT and rows.args[2:] == (0,) and value(rows).shape[0] == value(ids).shape[0]
    return operand(rows) if repeated else rows


# ---------------------------------------------------------------- grouped products


def _from_grouped(program: Program, node: fx.Node) -> fx.Node | None:
    """``grouped_mm(rows, weight, ends)``: row j belongs to the first expert whose rows end after j."""
    if node.target is EXPERT_LINEAR:
        ids = operand(node, 2)
        if ids.target is not aten.searchsorted.Tensor or not ids.kwargs.get("right"):
            return None
        if not is_arange(program, operand(ids, 1), value(ids).shape[0]):
            return None
        known = sorted_ids(program, operand(ids), *value(ids).shape)
        return None if known is None else Builder(before=node)(EXPERT_LINEAR, *node.args[:2], known)
    if bare_name(node.target) not in GROUPED or len(node.args) != 3:
        return None
    if any(given is not None for given in node.kwargs.values()):
        return None
    rows, weight, ends = (operand(node, i) for i in range(3))
    if len(value(rows).shape) != 2 or len(value(weight).shape) != 3 or value(rows).dtype != value(weight).dtype:
        return None
    op, count = Builder(before=node), value(rows).shape[0]
    return op(EXPERT_LINEAR, rows, weight, sorted_ids(program, ends, count) or _searched(op, ends, count))


def _searched(op: Builder, ends: fx.Node, count: int) -> fx.Node:
    """The expert of each row, from the ends of each expert's rows."""
    rows = op(aten.arange.default, count, dtype=value(ends).dtype)
    return op(aten.searchsorted.Tensor, ends, rows, right=True)


# ---------------------------------------------------------------- gathered weights


def _multiplied(node: fx.Node, product: GatheredProduct) -> tuple[fx.Node, fx.Node]:
    """A product with ``weight[ids]`` by expert_linear; and the same in the shape of ``node``."""
    op, weight, ids = Builder(before=node), product.weight, product.ids
    if product.turned:
        weight = op(aten.transpose.int, weight, 1, 2)
    count = math.prod(value(ids).shape)
    rows = _in_shape(op, product.rows, product.tokens, product.inner)
    found = op(EXPERT_LINEAR, rows, weight, _in_shape(op, ids, count))
    for user in list(node.users):
        if user.target in VIEWS and value(user).shape == value(found).shape:
            substitute(user, found)
    return found, _in_shape(op, found, *value(node).shape)


def _in_shape(op: Builder, source: fx.Node, *shape: int) -> fx.Node:
    """``source`` in another shape in front of ``node``, or the tensor it was reshaped from, if that has the shape."""
    below = source
    while below.target in VIEWS and value(below).shape != shape:
        below = operand(below)
    return below if value(below).shape == shape else op.reshape(source, *shape)
