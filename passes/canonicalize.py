"""Rewrite every operator to one form and drop those that do nothing, so that later passes see fewer cases.

before:
  x      = input x                                                        : f32[4,16,8]
  cast   = aten._to_copy(x, dtype=f32)                                    : f32[4,16,8]
  view   = aten.view(cast, [64, -1])                                      : f32[64,8]
  same   = aten.slice.Tensor(view, 0, 0, 9223372036854775807)             : f32[64,8]
  part   = aten.slice.Tensor(same, -1, -4, 9223372036854775807)           : f32[64,4]
  relu   = aten.relu(part)                                                : f32[64,4]
  return relu
after:
  x         = input x                                 : f32[4,16,8]
  reshape   = aten.reshape(x, [64, 8])                : f32[64,8]
  slice_1   = aten.slice.Tensor(reshape, 1, 4, 8, 1)  : f32[64,4]
  relu      = aten.relu(slice_1)                      : f32[64,4]
  return relu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir import canonical_views as views
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, is_flat, is_functional, placeholders_match_inputs
from autopar.ir.node import value
from autopar.ir.operator_facts import bare_name
from autopar.ir.own_memory import made_for_user, origin_of_memory
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, operand, remove_unused, substitute
from autopar.ir.tables import OutputKind

aten = torch.ops.aten

Rewrite = Callable[[fx.Node], fx.Node | None]  # None: it is in canonical form already


@graph_pass(ensures=(is_flat, is_functional, every_value_has_a_layout, placeholders_match_inputs))
def canonicalize(program: Program) -> Program:
    traced = list(program.graph.nodes)
    for_user, before = made_for_user(_returned(program)), set(traced)
    for node in traced:
        if node.op != "call_function":
            continue
        if _is_assertion(node):
            program.graph.erase_node(node)
            continue
        rewrite = REWRITES.get(node.target)
        new = rewrite(node) if rewrite else None
        if new is not None and new in before and node in for_user:
            owner = origin_of_memory(new)
            if owner.op == "placeholder" or owner in for_user:
                new = None if node.target is aten.clone.default else Builder(before=node)(aten.clone.default, new)
            for_user.add(owner)
        if new is not None:
            substitute(node, new)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _returned(program: Program) -> list[fx.Node]:
    results = zip(program.returned, program.outputs)
    return [node for node, entry in results if entry.kind is OutputKind.USER]


def _is_assertion(node: fx.Node) -> bool:
    return bare_name(node.target).startswith(("_assert", "sym_constrain")) and not node.users


def nothing(node: fx.Node) -> fx.Node:
    return operand(node)


def copy(node: fx.Node) -> fx.Node | None:
    if any(user.target is aten.view_as_complex.default for user in node.users):
        return None  # it needs the strides of a copy
    return operand(node)


def detach(node: fx.Node) -> fx.Node | None:
    return None if value(operand(node)).requires_grad else operand(node)


def dropout(node: fx.Node) -> fx.Node | None:
    _, probability, training = node.args
    return None if probability and training else operand(node)


def cast(node: fx.Node) -> fx.Node | None:
    """``_to_copy(x, dtype)`` or nothing; f32(x: bf16) cast back to bf16 is x."""
    source, dtype = operand(node), value(node).dtype
    if value(source).dtype == dtype:
        return source
    if source.target is aten._to_copy.default:
        first, wide = operand(source), value(source).dtype
        if value(first).dtype == dtype and dtype.is_floating_point and torch.promote_types(dtype, wide) == wide:
            return first
    if node.target is aten._to_copy.default and node.kwargs == {"dtype": dtype}:
        return None
    return Builder(before=node).cast(source, dtype)


def neutral(number: float) -> Rewrite:
    """x + 0, x * 1: nothing, where it does not promote the dtype."""

    def drop(node: fx.Node) -> fx.Node | None:
        source, other = node.args[:2]
        if isinstance(other, (int, float)) and other == number and isinstance(source, fx.Node):
            return views.keeps_shape(node)
        return None

    return drop


def sum_of(node: fx.Node) -> fx.Node | None:
    """alpha=1 is not written."""
    if node.kwargs.get("alpha") == 1:
        node.kwargs = {}
    return neutral(0)(node)


def attention(node: fx.Node) -> fx.Node | None:
    """Mask, dropout and causality by position; scale and enable_gqa by name."""
    rest = dict(node.kwargs)
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = dict(zip(defaults, node.args[3:]))
    node.args = (*node.args[:3], *(given.get(name, rest.pop(name, default)) for name, default in defaults.items()))
    node.kwargs = {name: setting for name, setting in rest.items() if (name, setting) != ("enable_gqa", False)}
    return None


def dense_gradient(node: fx.Node) -> None:
    """``embedding(..., sparse=True)``: gradients are reduced and split as dense tensors, of the same numbers."""
    node.args = node.args[:4]
    node.kwargs = {name: setting for name, setting in node.kwargs.items() if name != "sparse"}


def created(fill: float | None) -> Rewrite:
    """``x.new_zeros(shape)`` takes only its dtype from x, so it must not wait for x, nor require it whole."""

    def rewrite(node: fx.Node) -> fx.Node:
        number = node.args[2] if fill is None else fill
        kind = value(node)
        here = torch.device("cpu")  # emitted as the device of the rank
        return Builder(before=node)(aten.full.default, list(kind.shape), number, dtype=kind.dtype, device=here)

    return rewrite


def renamed(target: Any) -> Rewrite:
    def rewrite(node: fx.Node) -> fx.Node:
        settings: dict[str, Any] = dict(node.kwargs)
        return Builder(before=node)(target, *node.args, **settings)

    return rewrite


REWRITES: dict[Any, Rewrite] = {
    **views.REWRITES,
    aten.alias.default: nothing,
    aten.lift_fresh_copy.default: nothing,
    aten.lift_fresh.default: nothing,
    aten.contiguous.default: nothing,
    aten.clone.default: copy,
    aten.detach.default: detach,
    aten.zero.default: created(0),
    aten.new_empty.default: created(0),
    aten.new_zeros.default: created(0),
    aten.new_ones.default: created(1),
    aten.new_full.default: created(None),
    aten.dropout.default: dropout,
    aten.feature_dropout.default: dropout,
    aten._to_copy.default: cast,
    aten.to.dtype: cast,
    aten.to.dtype_layout: cast,
    aten.to.device: cast,
    aten.to.other: cast,
    aten.type_as.default: cast,
    aten.add.Tensor: sum_of,
    aten.sub.Tensor: sum_of,
    aten.mul.Tensor: neutral(1),
    aten.div.Tensor: neutral(1),
    aten.concat.default: renamed(aten.cat.default),
    aten.embedding.default: dense_gradient,
    aten.scaled_dot_product_attention.default: attention,
    aten.__and__.Tensor: renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: renamed(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: renamed(aten.bitwise_xor.Tensor),
}
