"""Rewrites layers of experts so that rows stay in the order of the tokens, each multiplied with its expert's matrix.

Grouped products (rows sorted by expert, and where each expert's rows end) and products with gathered weights
(``weight[ids]``, one matrix for each row) become ``autopar.expert_linear``. Sorting and its inverse vanish where each
row between them is treated alone: the batch can then be cut anywhere. A row that several experts get is not repeated.

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
import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, placeholders_match_inputs
from autopar.ir.layout import Layout
from autopar.ir.node import Value, value
from autopar.ir.operator_facts import is_pure
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, insert_before, operand, remove_unused, substitute
from autopar.ir.tables import InputKind
from autopar.operators.experts import EXPERT_LINEAR
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Dims, Factoring
from autopar.rules.sorted_rows import SORTS, SortedRows, descending, is_arange

aten = torch.ops.aten

GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
REPEAT = aten.repeat_interleave.self_int
VIEWS = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}


@graph_pass(ensures=(every_value_has_a_layout, placeholders_match_inputs))
def recognise_experts(program: Program) -> Program:
    weights = _weights(program)
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            new = _from_grouped(program, node) or _from_gathered(program, node, weights)
            if new is not None:
                substitute(node, new)
    remove_unused(program.graph)
    for node in list(program.graph.nodes):
        region = SortedRows.made_by(program, node)
        if region is not None and region.closed:
            region.remove()
    known: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.target is EXPERT_LINEAR:
            ids = operand(node, 2)
            known += [] if any(_same(ids, other) for other in known) else [ids]
            shared = next(other for other in known if _same(ids, other))
            node.args = (_unrepeated(node), node.args[1], shared)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _weights(program: Program) -> set[fx.Node]:
    """Parameters and what is made of them alone."""
    found = {node for node, _ in program.placeholders(InputKind.PARAMETER)}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _unrepeated(node: fx.Node) -> fx.Node:
    """The rows of an expert_linear; without their repetition, which the operator does itself."""
    rows, ids = operand(node), operand(node, 2)
    repeated = rows.target is REPEAT and rows.args[2:] == (0,) and value(rows).shape[0] == value(ids).shape[0]
    return operand(rows) if repeated else rows


# ---------------------------------------------------------------- grouped products


def _from_grouped(program: Program, node: fx.Node) -> fx.Node | None:
    """``grouped_mm(rows, weight, ends)``: row j belongs to the first expert whose rows end behind j."""
    if node.target is EXPERT_LINEAR:
        ids = operand(node, 2)
        if ids.target is not aten.searchsorted.Tensor or not ids.kwargs.get("right"):
            return None
        if not is_arange(program, operand(ids, 1), value(ids).shape[0]):
            return None
        known = _sorted_ids(program, operand(ids), *value(ids).shape)
        return None if known is None else insert_before(node, EXPERT_LINEAR, (*node.args[:2], known))
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name not in GROUPED or len(node.args) != 3 or any(given is not None for given in node.kwargs.values()):
        return None
    rows, weight, ends = (operand(node, i) for i in range(3))
    if len(value(rows).shape) != 2 or len(value(weight).shape) != 3 or value(rows).dtype != value(weight).dtype:
        return None
    (count, _), kind = value(rows).shape, value(ends)
    ids = _sorted_ids(program, ends, count) or _searched(node, ends, Value(kind.dtype, Layout.whole([count])))
    return insert_before(node, EXPERT_LINEAR, (rows, weight, ids))


def _searched(node: fx.Node, ends: fx.Node, kind: Value) -> fx.Node:
    """The expert of each row, from where each expert's rows end."""
    count = kind.shape[0]
    rows = insert_before(node, aten.arange.default, (count,), {"dtype": kind.dtype}, kind)
    ids = Value(torch.int64, kind.layout)
    return insert_before(node, aten.searchsorted.Tensor, (ends, rows), {"right": True}, ids)


def _sorted_ids(program: Program, ends: fx.Node, count: int) -> fx.Node | None:
    """The sorted ids, if ``ends`` is the running sum of how often each occurs."""
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
    sorts = [node for node in program.graph.nodes if node.target in SORTS and _same(operand(node), ids)]
    items = [item for sort in sorts if not descending(sort) for item in sort.users if item.args[1] == 0]
    return items[0] if items else None


def _same(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are the same call, written twice."""
    alike = a.op == b.op == "call_function" and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)
    return a is b or (alike and is_pure(a))


def _below_casts(node: fx.Node) -> fx.Node:
    while node.target is aten._to_copy.default:
        node = operand(node)
    return node


# ---------------------------------------------------------------- gathered weights


@dataclass(frozen=True)
class _Product:
    """A product of rows (tokens, I) with matrices (tokens, choices, I and O in any order): (tokens, choices, O)."""

    tokens: int
    inner: int
    outer: int
    turned: bool  # O stands before I


def _from_gathered(program: Program, node: fx.Node, weights: set[fx.Node]) -> fx.Node | None:
    """A product with ``weight[ids]`` by expert_linear, in the shape of ``node``."""
    rule = rule_for(node.target)
    if rule is None or len(node.all_input_nodes) != 2 or not any(map(_gather, node.all_input_nodes)):
        return None
    call = call_of(node, program.mesh)
    factoring = rule(call)
    for matrices, rows in ((0, 1), (1, 0)):
        gather = _gather(call.operands[matrices])
        if gather is None or operand(gather) not in weights or not factoring.contraction or len(call.operands) != 2:
            continue
        product = _product(factoring, matrices, rows)
        if product is not None:
            turned = product.turned != (gather is not call.operands[matrices])
            return _multiplied(node, call.operands[rows], gather, replace(product, turned=turned))
    return None


def _gather(node: fx.Node) -> fx.Node | None:
    """``weight[ids]``, perhaps below a transposition of its matrices."""
    rank = len(value(node).shape)
    if node.target is aten.transpose.int and {int(d) % rank for d in node.args[1:]} == {rank - 2, rank - 1}:  # type: ignore[arg-type]
        node = operand(node)
    if node.target is not aten.index.Tensor or len(value(operand(node)).shape) != 3:
        return None
    slots = node.args[1]
    assert isinstance(slots, (list, tuple))
    first = isinstance(slots[0], fx.Node) and value(slots[0]).dtype != torch.bool
    return node if first and all(slot is None for slot in slots[1:]) else None


def _product(factoring: Factoring, matrices: int, rows: int) -> _Product | None:
    dims = factoring.inputs[matrices]
    own, others, result = (_flat(side) for side in (dims, factoring.inputs[rows], factoring.outputs[0]))
    if any(len(factors) != 1 for factors in dims) or not others or not result:
        return None
    lead, pair, inner, outer = own[:-2], own[-2:], others[-1], result[-1]
    tokens = others[:-1]
    if tokens != lead[: len(tokens)] or result[:-1] != lead or sorted(pair) != sorted((inner, outer)):
        return None
    sizes = factoring.sizes
    return _Product(math.prod(sizes[f] for f in tokens), sizes[inner], sizes[outer], pair == [outer, inner])


def _flat(dims: Dims) -> list[str]:
    return [factor for factors in dims for factor in factors]


def _multiplied(node: fx.Node, rows: fx.Node, gather: fx.Node, product: _Product) -> fx.Node:
    weight, ids = operand(gather), gather.args[1][0]  # type: ignore[index]
    assert isinstance(ids, fx.Node)
    if product.turned:
        experts, outer, inner = value(weight).shape
        turned = replace(value(weight), layout=Layout.whole([experts, inner, outer]))
        weight = insert_before(node, aten.transpose.int, (weight, 1, 2), {}, turned)
    count = math.prod(value(ids).shape)
    arguments = (_in_shape(node, rows, product.tokens, product.inner), weight, _in_shape(node, ids, count))
    plain = replace(value(node), layout=Layout.whole([count, product.outer]))
    found = insert_before(node, EXPERT_LINEAR, arguments, {}, plain)
    for user in list(node.users):
        if user.target in VIEWS and value(user).shape == plain.shape:
            substitute(user, found)
    return _in_shape(node, found, *value(node).shape)


def _in_shape(node: fx.Node, source: fx.Node, *shape: int) -> fx.Node:
    """``source`` in another shape in front of ``node``; what it was made of, if that has the shape already."""
    below = source
    while below.target in VIEWS and value(below).shape != shape:
        below = operand(below)
    if value(below).shape == shape:
        return below
    kind = replace(value(source), layout=Layout.whole(shape))
    return insert_before(node, aten.reshape.default, (source, list(shape)), {}, kind)
