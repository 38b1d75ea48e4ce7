"""Sample calls of operators that work on each element, and of losses. See samples.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar import operators
from autopar.operators.straight_through import STRAIGHT_THROUGH
from autopar.verification.rule_check import Sample
from tests.rules.tensors import above, call, cplx, flags, ints, unit, x

aten = torch.ops.aten

BITS = ("bitwise", "shift", "xor", "gcd", "lcm")
ABOVE_ONE = ("acosh",)
WITH_INTS = ("ldexp",)
ORDERS = ("hermite", "laguerre", "legendre", "chebyshev")  # polynomials of degree n
FAILING = {  # arguments that the schema alone does not give
    aten.mvlgamma.default: [call(above(6, 4), 2)],
    aten.polygamma.default: [call(1, above(6, 4))],
    aten.nextafter.default: [call(x(6, 4), x(6, 1))],
    aten.frexp.Tensor: [call(x(6, 4))],
    aten.native_dropout_backward.default: [call(x(6, 4), flags(6, 4), 2.0)],
    **dict.fromkeys((aten.clamp.default, aten.clip.default), [call(x(6, 4), -1.0), call(x(5), None, 0.5)]),
    **dict.fromkeys((aten.clamp.Tensor, aten.clip.Tensor), [call(x(6, 4), x(6, 1)), call(x(6, 4), None, x(4))]),
    aten.round.decimals: [call(x(6, 4), decimals=1)],
}
NOT_DIFFERENTIABLE = {  # torch has no formula, for some operand at least
    aten.floor_divide.default,
    aten.heaviside.default,
    aten.igamma.default,
    aten.igammac.default,
    aten.copy.default,
    aten.logit_backward.default,
    aten.remainder.Scalar_Tensor,
    aten.silu_backward.default,
    aten.special_zeta.default,
    aten.special_zeta.other_scalar,
    aten.special_zeta.self_scalar,
}


def from_schema(target: Any) -> list[Sample]:
    """Two calls of a pointwise operator with broadcasting, from its schema: numbers are 0.5, tensors in (0, 1)."""
    if target in FAILING:
        return FAILING[target]
    name = target._schema.name.split("::")[1]
    shapes = (((6, 4), (1, 4), (6, 1)), ((3, 1, 6), (12, 6), (3, 12, 1)))
    still = (0, 1, 2) if target in NOT_DIFFERENTIABLE else ()
    return [Sample(tuple(_arguments(target, name, row)), {}, still=still) for row in shapes]


def _arguments(target: Any, name: str, shapes: tuple[tuple[int, ...], ...]) -> list[Any]:
    found: list[Any] = []
    for argument in target._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only or argument.has_default_value() and kind not in ("Scalar", "number"):
            break
        if kind in ("Tensor", "Optional[Tensor]"):
            found.append(_tensor(name, shapes[len(found) % 3], len(found)))
        elif kind == "int":
            found.append(2)
        elif kind == "str":
            found.append("floor")
        elif kind == "bool":
            found.append(True)
        elif kind in ("number", "float", "Optional[number]", "Optional[float]"):
            found.append(2 if any(bit in name for bit in BITS) else 0.5)
        else:
            raise AssertionError(f"{target}: no sample argument for {kind}; add it to FAILING")
    return found


def _tensor(name: str, shape: tuple[int, ...], position: int) -> Tensor:
    if any(bit in name for bit in BITS):
        return ints(4, *shape)
    if name in WITH_INTS and position or any(order in name for order in ORDERS) and position:
        return ints(4, *shape)
    if name in ABOVE_ONE:
        return above(*shape)
    if name == "where" and position == 0 or name == "masked_fill" and position == 1:
        return flags(*shape)
    return unit(*shape)


_BOTH = [call(x(6, 4), x(1, 4)), call(x(4), x(6, 1, 4)), call(x(12, 6), x(12, 6))]
_SAME = x(6, 4)

POINTWISE: dict[Any, list[Sample]] = {
    **dict.fromkeys(
        (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor), [*_BOTH, call(x(6, 4), 2.5), call(x(6, 1), x())]
    ),
    aten.div.Tensor: [call(x(6, 4), above(1, 4)), call(x(7, 5), above(7, 1)), call(x(7, 5), 3.0), call(x(5), above(5))],
    aten.div.Tensor_mode: [Sample((x(6, 4), unit(6, 1)), {"rounding_mode": "floor"})],
    aten.div.Scalar_mode: [Sample((x(6, 4), 0.5), {"rounding_mode": "trunc"})],
    aten.where.self: [call(flags(6, 1), x(6, 4), x(4)), call(flags(5), x(5), x(5))],
    aten.where.ScalarOther: [
        call(flags(6, 4), x(1, 4), 0.0),
        call(flags(6, 4), x(3, 6, 4), -1.0),
        call(flags(5), x(5), 0),
    ],
    aten.where.ScalarSelf: [call(flags(6, 4), 1.0, x(6, 4))],
    aten.where.Scalar: [call(flags(6, 4), 1.0, 0.0)],
    aten.masked_fill.Scalar: [call(x(6, 4), flags(1, 4), 0), call(x(6, 4), flags(6, 1), -5.0), call(x(5), flags(5), 0)],
    aten.masked_fill.Tensor: [call(x(6, 4), flags(1, 4), torch.tensor(2.0, dtype=torch.float64))],
    aten._to_copy.default: [call(x(6, 1, 5), dtype=torch.float32), call(ints(9, 6, 4), dtype=torch.float64)],
    aten.fill.Scalar: [call(x(6, 4), 2.0)],
    aten.zero.default: [call(x(6, 4))],
    aten.fill.Tensor: [call(x(6, 4), torch.tensor(2.0, dtype=torch.float64))],
    aten.copy.default: [call(x(6, 4), x(1, 4), still=(0, 1))],
    aten.dropout.default: [call(x(6, 4), 0.5, False), call(x(5), 0.0, True)],
    aten.mul.Scalar: [call(x(6, 5), 3.0)],
    STRAIGHT_THROUGH: [call(x(6, 4), x(6, 4)), call(x(5), x(5)), call(x(6, 1, 4), x(6, 1, 4), still=(0,))],
    aten.polar.default: [call(above(6, 4), x(6, 4))],
    aten.complex.default: [call(x(6, 4), x(6, 1))],
    **dict.fromkeys((aten.real.default, aten.imag.default, aten._conj.default), [call(cplx(6, 4))]),
    **dict.fromkeys((aten.resolve_conj.default, aten.resolve_neg.default), [call(cplx(6, 4))]),
    aten.full_like.default: [call(x(6, 4), 2.0)],
    **dict.fromkeys((aten.zeros_like.default, aten.ones_like.default), [call(x(6, 1, 4))]),
    aten.prelu.default: [call(x(6, 4, 3), x(4)), call(x(6, 4), x(1)), call(x(2, 1, 3), x(1))],
    **dict.fromkeys(
        (aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
        [call(x(5)), call(x(6, 1, 12))],
    ),
    operators.random_keep: [
        call(torch.tensor(5), 3, 0.5, torch.arange(6), torch.arange(4)),
        call(torch.tensor(5), 3, 0.5, torch.arange(12)),
    ],
    operators.random_uniform: [
        call(torch.tensor(5), 3, 0.9, 1.1, torch.float64, torch.arange(6), torch.arange(4)),
        call(torch.tensor(5), 3, 0.0, 1.0, torch.float32, torch.arange(12)),
    ],
}
POINTWISE[aten.mul.Tensor] = [*POINTWISE[aten.mul.Tensor], call(_SAME, _SAME)]
POINTWISE[aten.add.Tensor] = [*POINTWISE[aten.add.Tensor], call(_SAME, _SAME), call(x(7), x(7), alpha=2)]

_PAIR = ((x(6, 4), x(6, 4)), (x(3, 1, 6), x(3, 1, 6)), (x(12), x(12)))  # backward takes no broadcasting


def _each(first: Any, *rest: Any, position: int, **kwargs: Any) -> list[Sample]:
    """A loss of (x, target) with each reduction; ``rest`` are the arguments between target and reduction."""
    return [call(first(a), b, *rest[: position - 2], r, **kwargs) for a, b in _PAIR for r in (0, 1, 2)]


def _plain(a: Tensor) -> Tensor:
    return a


def _chance(a: Tensor) -> Tensor:
    return a.sigmoid()


def _signs(samples: list[Sample]) -> list[Sample]:
    return [call(s.args[0], s.args[1].sign(), *s.args[2:], still=(1,)) for s in samples]


_TARGETS = torch.tensor([1, 0, -100, 3, 2, -100])
_CLASSES = [
    *[call(x(6, 4), _TARGETS, None, r) for r in (0, 1, 2)],
    call(x(6, 4), torch.tensor([1, -100, -100, 3, 2, 0]), None, 1),
    call(x(6, 4, 3), ints(4, 6, 3), None, 1, 2),
    call(x(4), torch.tensor(2)),
    call(x(6, 4), _TARGETS, above(4), 1, still=(2,)),
    call(x(6, 4), _TARGETS, above(4), 2, still=(2,)),
]

LOSSES: dict[Any, list[Sample]] = {
    **dict.fromkeys(
        (aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default),
        _each(_plain, position=2),
    ),
    aten.kl_div.default: [*_each(_plain, position=2), *_each(_plain, position=2, log_target=True)],
    aten.soft_margin_loss.default: _signs(_each(_plain, position=2)),
    aten.hinge_embedding_loss.default: _signs(_each(_plain, 1.0, position=3)),
    aten.poisson_nll_loss.default: _each(_plain, True, False, 1e-8, position=5),
    aten.binary_cross_entropy.default: [
        Sample((s.args[0], s.args[1].sigmoid(), *s.args[2:]), s.kwargs) for s in _each(_chance, None, position=3)
    ],
    aten.binary_cross_entropy_with_logits.default: [
        *_each(_plain, None, None, position=4),
        call(x(6, 4), unit(6, 4), None, above(4), 1, still=(2,)),
        call(x(6, 4), unit(6, 4), unit(6, 1), None, 0, still=(2,)),
    ],
    aten.margin_ranking_loss.default: [call(x(6), x(6), x(6).sign(), 0.1, r) for r in (0, 1, 2)],
    aten.multi_margin_loss.default: [call(x(6, 4), ints(4, 6), 1, 1.0, None, r) for r in (0, 1, 2)],
    aten.nll_loss_nd.default: _CLASSES,
    aten.cross_entropy_loss.default: [
        *_CLASSES,
        call(x(6, 4), _TARGETS, None, 1, -100, 0.1),
        call(x(6, 4), _TARGETS, label_smoothing=0.1),
        *[call(x(6, 4, 3), unit(6, 4, 3), None, r) for r in (0, 1, 2)],
    ],
    operators.cross_entropy_sums: [
        call(x(6, 4), _TARGETS, None, -100, 0.0),
        call(x(6, 7), _TARGETS, None, -100, 0.1),
        call(x(6, 12), ints(12, 6), None, -100, 0.1),
        call(x(2, 9, 3), ints(9, 2, 3), None, 2, 0.0),
        call(x(12), torch.tensor(3), None, -100, 0.0),
        call(x(6, 4), _TARGETS, above(4), -100, 0.0, still=(2,)),
        call(x(6, 4), unit(6, 4), None, -100, 0.0),
    ],
    operators.vocabulary_maximum: [
        call(x(6, 4), ints(8, 6), torch.tensor(1), 8),
        call(x(2, 4, 3), ints(7, 2, 3), torch.tensor(1), 7),
    ],
    operators.vocabulary_sums: [
        call(x(6, 4), x(6), ints(8, 6), torch.tensor(1), 8, 0.0),
        call(x(2, 4, 3), x(2, 3), ints(8, 2, 3), torch.tensor(0), 8, 0.1),
        call(x(6, 4), x(6), ints(8, 6), torch.tensor(1), 8, 0.0, 2),
    ],
    operators.cross_entropy_from_parts: [
        call(above(6), x(6), None, ints(8, 6), 8, 2, 0.0),
        call(above(2, 3), x(2, 3), x(2, 3), ints(8, 2, 3), 8, -100, 0.1),
    ],
}
