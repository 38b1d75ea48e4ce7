"""Conversions of a value from one placement on an axis to another: the collectives they take, and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from autopar.cost.machine import BANDWIDTH, LATENCY
from autopar.ir import collectives as comm
from autopar.ir.layout import INVARIANT, REPLICATED, Partial, Placement, Split, Whole

ELEMENTWISE = 1e-16  # seconds per element: breaks ties only
WHOLE_PARAMETER = 1e-12  # seconds per byte of a parameter that is left whole on the axis
PENDING = 1e-7  # seconds for keeping a sum pending through one more operator: reduce it where it arises

BIG = 1e6  # the cost of a choice that is not allowed


@dataclass(frozen=True)
class Step:
    """One collective: ``op`` is a name of ``autopar.ir.collectives``."""

    op: str
    source: Placement
    target: Placement


@cache
def route(source: Placement, target: Placement, gradient: bool = True) -> tuple[Step, ...]:
    """The collectives that turn ``source`` into ``target``, shortest first."""
    if source == target:
        return ()
    if isinstance(source, Whole) and isinstance(target, Partial):
        return (*route(source, INVARIANT), _step(INVARIANT, target))
    if isinstance(source, Partial) and not (isinstance(target, Split) and source.op == "sum"):
        return (_step(source, INVARIANT), *route(INVARIANT, target))
    if isinstance(source, Split) and isinstance(target, Split) and source.dim == target.dim:
        if source.mirrored or target.mirrored:
            return (Step("reorder", source, target),)
        whole = normalised(REPLICATED, gradient)
        return (*route(source, whole), *route(whole, target))
    return (_step(source, target),)


def _step(source: Placement, target: Placement) -> Step:
    return Step(comm.CONVERSIONS[comm.held(source), comm.held(target)], source, target)


def through_whole(step: Step) -> tuple[Step, Step]:
    """The two steps in place of one from split to split: an all-to-all takes only parts of equal size."""
    return _step(step.source, REPLICATED), _step(REPLICATED, step.target)


def step_cost(step: Step, size: int, gradient: bool, ways: int) -> float:
    """Seconds for one collective on a whole tensor of ``size`` bytes, and with ``gradient`` for its dual too."""
    row = comm.COLLECTIVES[step.op]
    total = 0.0
    for name, operand in ((step.op, row.before), (row.dual, row.after)) if gradient else ((step.op, row.before),):
        moved = comm.COLLECTIVES[name].sends(ways, size * ways) / ways  # linear: nothing is lost to whole bytes
        if moved:
            total += LATENCY + (moved / ways if operand == "S" else moved) / BANDWIDTH
    return total + 1e-9  # fewer nodes before more


@cache
def plan_placements(
    source: Placement, placements: frozenset[Placement], size: int, gradient: bool, ways: int
) -> tuple[float, tuple[tuple[Placement, Step | None], ...]]:
    """The cheapest way to hold a value in every one of ``placements`` when it is produced in ``source``.

    Returns (cost, ((placement, last step into it), ...)). One placement may be reached through another one (an
    all-reduced sum is entered once, not reduced twice). Placements that are only passed through are listed too.
    """
    made: dict[Placement, Step | None] = {source: None}
    total = 0.0
    for placement in sorted(placements, key=_order):
        if placement in made:
            continue
        routes = {have: route(have, placement, gradient) for have in made}
        costs = {have: sum(step_cost(s, size, gradient, ways) for s in steps) for have, steps in routes.items()}
        for step in routes[min(made, key=lambda have: (costs[have], _order(have)))]:
            if step.target not in made:
                made[step.target] = step
                total += step_cost(step, size, gradient, ways)
    return total, tuple(made.items())


def _order(placement: Placement) -> tuple[int, str]:
    rank = 0 if placement == INVARIANT else 1 if placement == REPLICATED else 2
    return rank, str(placement)


def normalised(placement: Placement, gradient: bool) -> Placement:
    """``placement``, or INVARIANT for REPLICATED without a gradient: the two differ only in the backward pass."""
    return INVARIANT if placement == REPLICATED and not gradient else placement
