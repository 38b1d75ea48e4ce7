"""Collectives of axes that were split earlier: for the present axis they are ordinary operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.ir.collectives import AXIS, COLLECTIVES, ENDS, OPS, PART, REDUCTION, STEPS
from autopar.rules.factoring import Call, Factoring
from autopar.rules.pointwise import broadcast
from autopar.rules.views import FIRST, keeps_other_dims


def elementwise(call: Call) -> Factoring:
    factoring = broadcast(call)
    return replace(factoring, linear=FIRST, uneven=frozenset(factoring.sizes))


def reduced(call: Call) -> Factoring:
    summed = call.argument(2, "op") == "sum"
    return replace(elementwise(call), linear=FIRST if summed else ())


def joined(call: Call) -> Factoring:
    """The dim that the other axis splits stays whole on this axis."""
    return keeps_other_dims(call, {int(call.args[3])}, FIRST)


def exchanged(call: Call) -> Factoring:
    return keeps_other_dims(call, {int(call.args[3][0]), int(call.args[4][0])}, FIRST)


def position(call: Call) -> Factoring:
    """A rank's position on another axis: a number, with nothing to split."""
    return Factoring((), ((),), {})


BY_FORM = {AXIS: elementwise, REDUCTION: reduced, PART: joined, ENDS: exchanged, STEPS: elementwise}
RULES: dict[Any, Any] = {
    OPS.axis_index.default: position,
    **{getattr(OPS, name).default: BY_FORM[row.form] for name, row in COLLECTIVES.items()},
}
