"""Facts about operators, apart from how they are split: one row for each, and one small function for each question.

Torch itself answers some questions (by an operator's schema, its tags, its kernels). The other facts are in ``FACTS``,
by the name of the operator without its overload, one kind of fact at a time. An operator that is not listed has the
default values of ``Facts``.
"""

from __future__ import annotations

import enum
import functools
import operator
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, values
from autopar.operators.registry import REGISTRY

aten = torch.ops.aten

Groups = tuple[frozenset[int], ...]  # sets of argument positions


class Kept(enum.Enum):
    """The values that the backward pass of an operator needs from the forward pass."""

    OPERANDS = "all that it takes"
    FACTORS = "each operand for the gradient of the other"
    QUOTIENT = "both operands; nothing of what is divided by a number"
    CONDITION = "the operands that are no floating-point numbers"
    RESULT = "what it returns"
    ATTENTION = "queries, keys, values and mask, and the result where it is computed whole"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Facts:
    """Facts that torch does not record.

    Attributes:
        product: a product of matrices, a convolution or an attention: these dominate training time.
        moves: moves or makes elements, and computes nothing.
        linear: the sets of argument positions in which it is jointly linear, the other arguments held fixed.
        kept: the values that backward needs from forward.
        differentiable: the number of its results, from the first, through which gradients flow.
    """

    product: bool = False
    moves: bool = False
    linear: Groups = ()
    kept: Kept = Kept.OPERANDS
    differentiable: int = sys.maxsize


def _names(text: str) -> list[str]:
    return text.split()


_FIRST: Groups = (frozenset({0}),)

_PRODUCTS = _names("""
    linear mm bmm matmul mv dot addmm addmv baddbmm bilinear einsum
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution convolution_backward
    scaled_dot_product_attention lstm gru rnn_tanh rnn_relu
    autopar::recurrent_layer autopar::attention autopar::attention_backward
    autopar::attention_tile autopar::attention_tile_backward op.masked_attention
    op.ring_attention op.rows_attention op.hybrid_attention
    autopar::expert_linear autopar::expert_outer
    op.padded_convolution
""")
_MOVES = _names("""
    reshape clone contiguous cat stack pad constant_pad_nd roll flip repeat zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty embedding index index_select gather
""")
_LINEAR: dict[Groups, list[str]] = {
    _FIRST: _names("""
        neg div divide true_divide clone _to_copy cat stack sum mean cumsum flip roll gather index index_select take
        repeat tril triu trace diag_embed embedding _conj _conj_physical _fft_r2c _fft_c2c _fft_c2r im2col col2im
        avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d reflection_pad2d replication_pad2d
        pixel_shuffle pixel_unshuffle _reshape_copy lift_fresh_copy
    """),
    (frozenset({1}),): ["copy"],
    (frozenset({0}), frozenset({1})): _names("mul multiply mm bmm mv dot matmul"),
    (frozenset({0, 1}),): _names("""
        add sub subtract rsub slice_scatter select_scatter diagonal_scatter complex lerp addcdiv
        autopar::straight_through
    """),
    (frozenset({0, 2}),): _names("masked_fill masked_scatter index_put constant_pad_nd"),
    (frozenset({0, 3}),): _names("scatter scatter_add index_add index_copy index_fill"),
    (frozenset({1, 2}),): ["where"],
    (frozenset({0, 1}), frozenset({0, 2})): _names("addmm addmv baddbmm addcmul"),
    (frozenset({0, 2}), frozenset({1, 2})): ["convolution"],
}
_KEPT = {
    Kept.NOTHING: _names("""
        add sub neg sum mean cat stack clone _to_copy to repeat pad embedding index index_select gather scatter roll
        flip contiguous cumsum
    """),
    Kept.RESULT: _names("relu sigmoid tanh exp sqrt rsqrt softmax _softmax"),
    Kept.CONDITION: _names("where masked_fill"),
    Kept.FACTORS: ["mul"],
    Kept.QUOTIENT: ["div"],
    Kept.ATTENTION: _names("""
        scaled_dot_product_attention autopar::attention autopar::attention_tile op.masked_attention
    """),
}
_DIFFERENTIABLE = {
    0: _names("""
        detach zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty
        bernoulli
    """),
    1: _names("""
        _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
        native_dropout op.cross_entropy_sums
    """),
}


def _table() -> dict[str, Facts]:
    rows: dict[str, Facts] = defaultdict(Facts)
    columns: list[tuple[str, Any, list[str]]] = [("product", True, _PRODUCTS), ("moves", True, _MOVES)]
    columns += [("linear", groups, names) for groups, names in _LINEAR.items()]
    columns += [("kept", kept, names) for kept, names in _KEPT.items()]
    columns += [("differentiable", count, names) for count, names in _DIFFERENTIABLE.items()]
    for fact, found, names in columns:
        for name in names:
            rows[name] = replace(rows[name], **{fact: found})
    return dict(rows)


FACTS = _table()
_ROUNDING = (aten.div.Tensor_mode, aten.div.Scalar_mode)
# torch has no tag for these
_ALSO_POINTWISE = {
    aten._to_copy.default, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
}  # fmt: skip
# Splits whose parts may be written to: torch lets nobody see that in the tensor that they are parts of.
UNSAFE_SPLITS: dict[Any, Any] = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
# Kernels lay out some results (batch normalisation's of a transposed tensor) otherwise than their meta forms say.
_WHATEVER_THE_STRIDES = dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default)
VIEWS = frozenset((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default))  # other sizes only
CASTS = (aten._to_copy.default,)


# ---------------------------------------------------------------- names


def runnable(target: Any) -> Any:
    """What to call for ``target`` with real tensors."""
    return _WHATEVER_THE_STRIDES.get(target, target)


def is_overload(target: Any) -> bool:
    """Whether ``target`` is an operator of torch, and not a function of Python such as ``getitem``."""
    return isinstance(target, torch._ops.OpOverload)


def is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and is_overload(node.target)


def packet_of(node: fx.Node) -> Any:
    """The operator without its overload."""
    assert isinstance(node.target, torch._ops.OpOverload), node.format_node()
    return node.target.overloadpacket


@functools.cache
def argument_names(target: Any) -> tuple[str, ...]:
    """The names of the arguments of an operator, in their order."""
    return tuple(argument.name for argument in target._schema.arguments)


@functools.cache
def bare_name(target: Any) -> str:
    """``mm`` for ``aten.mm.default``, ``mylib::op`` for an operator outside torch, ``op.loss`` for one of ours.

    It is ``""`` for any other function. Ours are functions of :mod:`autopar.operators`.
    """
    if not is_overload(target):
        name = getattr(target, "__name__", "")
        return f"op.{name}" if name and REGISTRY.get(name) is target else ""
    namespace, name = target._schema.name.split("::")
    return name if namespace in ("aten", "prims") else f"{namespace}::{name}"


def facts_of(target: Any) -> Facts:
    return FACTS.get(bare_name(target), _UNKNOWN)


_UNKNOWN = Facts()

# ---------------------------------------------------------------- what torch says


@functools.cache
def is_view(target: Any) -> bool:
    """Whether ``target`` returns its first argument's memory under other sizes and strides."""
    if target is aten._unsafe_view.default:
        return True
    if not is_overload(target) or writes(target):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


@functools.cache
def is_random(target: Any) -> bool:
    return is_overload(target) and torch.Tag.nondeterministic_seeded in target.tags


@functools.cache
def is_factory(target: Any) -> bool:
    """Whether ``target`` makes a tensor out of numbers alone (full, arange, axis_index, ...)."""
    if not is_overload(target) or is_random(target):
        return False
    return not any("Tensor" in str(argument.type) for argument in target._schema.arguments)


def writes(target: Any) -> bool:
    """Whether ``target`` changes one of its arguments."""
    return is_overload(target) and bool(target._schema.is_mutable)


def is_pure(target: Any) -> bool:
    """Whether ``target`` gives the same result for the same operands, at each step."""
    if not is_overload(target):
        return target is operator.getitem
    return not writes(target) and not is_random(target)


@functools.cache
def is_pointwise(target: Any) -> bool:
    """Whether each element of the result depends on the corresponding elements of the (broadcast) operands only."""
    if target in _ALSO_POINTWISE:
        return True
    tags = target.tags if is_overload(target) else ()
    return torch.Tag.pointwise in tags and torch.Tag.data_dependent_output not in tags  # aten.equal gives a bool


@functools.cache
def is_composite(target: Any, *, in_python: bool = True) -> bool:
    """Whether torch decomposes ``target`` above its kernels (``CompositeImplicitAutograd``).

    ``in_python``: tracing does so with some operators that have a kernel when they run (``upsample_nearest2d``).
    """
    if not is_overload(target):
        return False
    if in_python:
        return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))


# ---------------------------------------------------------------- what the table says


def is_product(target: Any) -> bool:
    """Whether ``target`` is a product of matrices, a convolution or an attention: these dominate training time."""
    return facts_of(target).product


def only_moves(target: Any) -> bool:
    """Whether ``target`` is a view, or moves and makes elements without computing."""
    return is_view(target) or facts_of(target).moves


@functools.cache
def linear_in(target: Any) -> Groups:
    """The sets of argument positions in which ``target`` is jointly linear, the other arguments held fixed.

    Arguments of a set that are no tensors must be zero: ``x + 1`` is not linear in x.
    """
    if not is_overload(target) or target in _ROUNDING:
        return ()
    formula = target.namespace in ("aten", "prims") and bare_name(target).endswith(("_backward", "_backward_data"))
    if is_view(target) or formula:  # torch's own formulas are linear in their first argument, the gradient
        return _FIRST
    return facts_of(target).linear


def is_free(node: Node) -> bool:
    """Whether ``node`` costs nothing to recompute: views, numbers, casts of an input (the parameter is available)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_free(node.all_input_nodes[0])
    if node.target in CASTS:
        return all(source.op == "placeholder" for source in node.all_input_nodes)
    return is_view(node.target) or is_factory(node.target)


# ---------------------------------------------------------------- types of results


def types_of(node: fx.Node, fake: Any) -> Iterator[Value]:
    """The types of the results of ``node``, with the shapes of ``fake``; its inputs have their types already."""
    differentiable = _differentiable(node, fake)
    tensors = [item for item in (fake if isinstance(fake, (tuple, list)) else [fake]) if isinstance(item, Tensor)]
    for position, tensor in enumerate(tensors):
        floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        yield Value(tensor.dtype, Layout.whole(tensor.shape), floating and position < differentiable)


def _differentiable(node: fx.Node, fake: Any) -> int:
    """The number of results, from the first, through which gradients flow (if they are floating)."""
    if node.op == "placeholder":
        return int(fake.requires_grad)
    if node.target is operator.getitem:
        position = node.args[1]
        assert isinstance(position, int)
        return int(values(node.all_input_nodes[0])[position].requires_grad)
    if not any(value.requires_grad for source in node.all_input_nodes for value in values(source)):
        return 0
    return facts_of(node.target).differentiable
