"""Collectives of axes that were split earlier: for the present axis they are ordinary operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.ir.collectives import AXIS, COLLECTIVES, ENDS, OPS, ORDERS, PART, REDUCTION, STEPS
from autopar.ir.layout import Split
from autopar.rules.factoring import ANY_SIZE, Call, Factoring, Shape, Strategy, Ways, dims_of
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


def reordered(call: Call) -> Factoring:
    """As :func:`joined`."""
    return keeps_other_dims(call, {int(call.args[3][0])}, FIRST)


def exchanged(call: Call) -> Factoring:
    """The two dims stay whole on this axis, but for the blocks in front of what the other axis splits."""
    ends = [Split.of(end[0], end[1], end[2:]) for end in call.args[3:5]]
    names, sizes = dims_of(call.inputs[0])
    dims: list[list[Any]] = [list(names), list(names)]  # of the operand and of the result
    whole = set()
    for end in ends:
        blocks, inside = f"blocks{end.dim}", f"d{end.dim}"
        whole.add(inside)
        if end.outer == 1 or end.mirrored:
            continue
        sizes |= {blocks: end.outer, inside: ANY_SIZE}
        for side in dims:
            side[end.dim] = (blocks, inside)
    return Factoring(
        (tuple(dims[0]),), (tuple(dims[1]),), sizes | dict.fromkeys(whole, ANY_SIZE), whole=frozenset(whole),
        linear=FIRST, localize=_fewer_blocks,
    )  # fmt: skip


def _fewer_blocks(
    call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an exchange of which this axis splits the blocks of one dim."""
    assert strategy.part is not None
    ends = [list(end) for end in call.args[3:5]]
    for end in ends:
        if strategy.part.factor == f"blocks{end[0]}":
            end[1] //= ways
    return (*call.args[:3], *ends), dict(call.kwargs)


def position(call: Call) -> Factoring:
    """A rank's position on another axis: a number, with nothing to split."""
    return Factoring((), ((),), {})


BY_FORM = {AXIS: elementwise, REDUCTION: reduced, PART: joined, ENDS: exchanged, ORDERS: reordered, STEPS: elementwise}
RULES: dict[Any, Any] = {  # none for what sends rows to experts: every axis is split before that
    OPS.axis_index.default: position,
    **{getattr(OPS, name).default: BY_FORM[row.form] for name, row in COLLECTIVES.items() if row.form in BY_FORM},
}
