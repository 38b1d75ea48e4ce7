"""Collectives of axes that were split earlier: for the axis at hand they are ordinary operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.ir.collectives import OPS
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
    """The dim that the other axis splits stays whole here."""
    return keeps_other_dims(call, {int(call.args[3])}, FIRST)


def exchanged(call: Call) -> Factoring:
    return keeps_other_dims(call, {int(call.args[3][0]), int(call.args[4][0])}, FIRST)


def position(call: Call) -> Factoring:
    """A rank's position on another axis: a number, nothing to split."""
    return Factoring((), ((),), {})


RULES: dict[Any, Any] = {
    OPS.axis_index.default: position,
    **dict.fromkeys((OPS.enter.default, OPS.release.default, OPS.keep_first.default), elementwise),
    OPS.all_reduce.default: reduced,
    **dict.fromkeys((OPS.all_gather.default, OPS.all_gather_invariant.default, OPS.pad.default), joined),
    **dict.fromkeys((OPS.reduce_scatter.default, OPS.split.default, OPS.split_replicated.default), joined),
    OPS.all_to_all.default: exchanged,
}
