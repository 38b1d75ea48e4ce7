"""Operators that work on each element alone: every dim may be split, dims of size 1 are broadcast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.ir.operator_facts import linear_in
from autopar.operators.straight_through import STRAIGHT_THROUGH
from autopar.rules.factoring import Call, Dims, Factoring, Shape

aten = torch.ops.aten

# Padding holds whatever earlier operators computed from it. These operators keep it finite, and their slopes too: what
# is computed from it stays in the padding. The square root of a zero would send a NaN back into the weights.
_TAME = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten.abs.default, aten.square.default, aten.relu.default,
    aten.relu6.default, aten.gelu.default, aten.silu.default, aten.mish.default, aten.elu.default, aten.selu.default,
    aten.celu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.hardsigmoid.default,
    aten.hardswish.default, aten.sigmoid.default, aten.log_sigmoid.default, aten.softplus.default, aten.tanh.default,
    aten.sin.default, aten.cos.default, aten.erf.default, aten.threshold.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.clone.default, aten.detach.default,
    aten._to_copy.default, aten.dropout.default, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor,
    aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar,
    aten.ge.Tensor, aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, STRAIGHT_THROUGH,
}  # fmt: skip


def broadcast_dims(shape: Shape) -> Dims:
    """Factors ``d1, d2, ...`` counted from the last dim, as broadcasting aligns them; none for a dim of size 1."""
    return tuple((f"d{len(shape) - i}",) if size != 1 else () for i, size in enumerate(shape))


def broadcast(call: Call) -> Factoring:
    """``f(a, b, ...)`` element by element with numpy's broadcasting."""
    sizes: dict[str, int] = {}
    for shape in (*call.inputs, *call.outputs):
        for i, size in enumerate(shape):
            if size != 1:
                sizes[f"d{len(shape) - i}"] = size
    inputs = tuple(map(broadcast_dims, call.inputs))
    return Factoring(
        inputs,
        tuple(map(broadcast_dims, call.outputs)),
        sizes,
        uneven=_padded(call, inputs, sizes),
        linear=_linear(call),
    )


def _padded(call: Call, inputs: tuple[Dims, ...], sizes: dict[str, int]) -> frozenset[str]:
    """The factors that may have padding; those of a divisor may not."""
    if call.target in _TAME:
        return frozenset(sizes)
    if call.target is aten.div.Tensor and call.args:
        divisor = {factor for dim in inputs[1] for factor in dim} if len(inputs) > 1 else set()
        return frozenset(sizes) - divisor
    return frozenset()


def _linear(call: Call) -> tuple[frozenset[int], ...]:
    """The operands that may be pending sums together: those of a set of arguments in which the operator is jointly
    linear, where no other of the set is a number but zero (``x + 1.0`` is not linear in x)."""
    if call.target is aten._to_copy.default and not call.kwargs.get("dtype", torch.float32).is_floating_point:
        return ()
    if any(isinstance(given, fx.Node) for given in call.kwargs.values()):
        return ()
    operands: dict[int, int] = {}  # position among the arguments -> number of the operand
    for position, given in enumerate(call.args):
        if isinstance(given, fx.Node):
            operands[position] = len(operands)
    groups = [[position for position in group if position < len(call.args)] for group in linear_in(call.target)]
    fitting = [group for group in groups if all(place in operands or call.args[place] == 0 for place in group)]
    found = (frozenset(operands[place] for place in group if place in operands) for group in fitting)
    return tuple(group for group in found if group)


def _like(call: Call) -> Factoring:
    """``zeros_like``: the shape of the operand and none of its elements."""
    return replace(broadcast(call), linear=())


def prelu(call: Call) -> Factoring:
    """(N, C, ...) with one slope for all or one for each channel."""
    shape, slopes = call.inputs
    names = [f"d{i}" for i in range(len(shape))]
    dims: Dims = tuple((name,) if size != 1 else () for name, size in zip(names, shape))
    slope: Dims = (dims[1] if slopes[0] != 1 else (),) if slopes else ()
    return Factoring((dims, slope), (dims,), dict(zip(names, shape)))


# torch has no tag for these
_UNTAGGED = (
    aten._to_copy.default, aten.detach.default, aten.dropout.default, aten.masked_fill.Tensor, aten.fill.Scalar,
    aten.fill.Tensor, aten.zero.default, aten.copy.default, aten.floor_divide.default,
    aten.where.ScalarOther, aten.where.ScalarSelf,
    aten.where.Scalar, aten.where.self, aten.polar.default, aten.complex.default, aten.real.default,
    aten.imag.default, aten.log_sigmoid.default, aten.hardswish.default, aten.rsub.Tensor, aten.isclose.default,
    aten.nan_to_num.default, aten.float_power.Tensor_Scalar, aten._conj.default,
    aten.resolve_conj.default, aten.resolve_neg.default, aten.square.default, aten.subtract.Tensor,
    aten.multiply.Tensor, aten.divide.Tensor, aten.special_expit.default, aten.fix.default, aten.absolute.default,
    aten.floor_divide.Scalar, aten.isin.Tensor_Scalar,
    STRAIGHT_THROUGH,
)  # fmt: skip

RULES: dict[Any, Any] = {
    **dict.fromkeys(_UNTAGGED, broadcast),
    **dict.fromkeys((aten.zeros_like.default, aten.ones_like.default, aten.full_like.default), _like),
    aten.empty_like.default: _like,
    aten.prelu.default: prelu,
}
