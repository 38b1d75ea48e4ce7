"""What is known of an operator apart from how it is split: views, randomness, purity, types of results."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, values
from autopar.ir.rewrite import operand
from autopar.operators import cross_entropy_sums

aten = torch.ops.aten

# torch has no tag for these
_ALSO_POINTWISE = {
    aten._to_copy.default, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
}  # fmt: skip


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the corresponding elements of the (broadcast) operands only."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags or node.target in _ALSO_POINTWISE


def is_pure(node: fx.Node) -> bool:
    """Whether ``node`` gives the same result for the same operands, at each step."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def packet_of(node: fx.Node) -> Any:
    """The operator without its overload."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target.overloadpacket


CASTS = (aten._to_copy.default,)


def is_free(node: Node) -> bool:
    """Whether ``node`` costs nothing to make again: views, numbers, casts of an input (the parameter is at hand)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_free(node.all_input_nodes[0])
    if node.target in CASTS:
        return all(source.op == "placeholder" for source in node.all_input_nodes)
    return is_view(node.target) or is_factory(node.target)


VIEWS = frozenset((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default))  # other sizes only


@functools.cache
def is_view(target: Any) -> bool:
    """Whether ``target`` returns its first argument's memory under other sizes and strides."""
    if target is aten._unsafe_view.default:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


@functools.cache
def is_random(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


@functools.cache
def is_factory(target: Any) -> bool:
    """Whether ``target`` makes a tensor out of numbers alone (full, arange, axis_index, ...)."""
    if not isinstance(target, torch._ops.OpOverload) or is_random(target):
        return False
    return not any("Tensor" in str(argument.type) for argument in target._schema.arguments)


STOPS_GRADIENT = {
    aten.detach.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.rand_like.default, aten.randn_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty.default, aten.bernoulli.default, aten.bernoulli.p,
}  # fmt: skip
# operators of which only the first outputs are differentiable
DIFFERENTIABLE_OUTPUTS = {
    aten._native_batch_norm_legit_functional.default: 1,
    aten._native_batch_norm_legit_no_training.default: 1,
    aten.native_dropout.default: 1,
    cross_entropy_sums: 1,
}


def types_of(node: fx.Node, fake: Any) -> Iterator[Value]:
    """The types of what ``node`` returns, of which ``fake`` has the shapes; its inputs have theirs already."""
    differentiable = _differentiable(node, fake)
    tensors = [item for item in (fake if isinstance(fake, (tuple, list)) else [fake]) if isinstance(item, Tensor)]
    for position, tensor in enumerate(tensors):
        floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        yield Value(tensor.dtype, Layout.whole(tensor.shape), floating and position < differentiable)


def _differentiable(node: fx.Node, fake: Any) -> int:
    """How many of the results, from the first, gradients flow through (if they are floating)."""
    if node.op == "placeholder":
        return int(fake.requires_grad)
    if node.target is operator.getitem:
        position = node.args[1]
        assert isinstance(position, int)
        return int(values(operand(node))[position].requires_grad)
    if not any(value.requires_grad for source in node.all_input_nodes for value in values(source)):
        return 0
    if node.target in STOPS_GRADIENT:
        return 0
    return DIFFERENTIABLE_OUTPUTS.get(node.target, sys.maxsize)
