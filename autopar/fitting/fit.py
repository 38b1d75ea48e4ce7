"""The meshes for a number of devices: for each the plan that fits and is estimated to be fastest, or why none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.fitting.estimate import Estimate, estimate
from autopar.fitting.meshes import Refused, Wanted, impossible, meshes, tried_axes
from autopar.fitting.prices import Price, Prices, within_stage
from autopar.fitting.weights import WEIGHTS
from autopar.ir.batch import data_ways
from autopar.ir.traffic import size_text
from autopar.memory.optimizers import optimizer_named
from autopar.mesh import PIPELINE, Mesh
from autopar.plan import Plan

ZERO, RECOMPUTE, ROWS = (0, 1, 2, 3), ("none", "selective", "full"), (1, 2, 4)

PriceOf = Callable[[Mesh, Plan], Price | str]


@dataclass(frozen=True)
class Fitting:
    """A mesh with the plans that are estimated to fit it, fastest first."""

    mesh: Mesh
    plans: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        return self.plans[0]


def fits(prices: Prices, wanted: Wanted) -> Iterator[Fitting | Refused]:
    """All meshes, each as soon as it is priced: the one first that is guessed to be fastest; then the impossible."""
    model = prices.of_model
    axes, _ = tried_axes(model, wanted)
    reasons = [(mesh, impossible(mesh, model, wanted)) for mesh in meshes(wanted, axes)]
    possible = [mesh for mesh, why in reasons if why is None]
    for mesh in sorted(possible, key=lambda mesh: _guess(mesh, prices, wanted)):
        yield plans_of(mesh, prices.of, prices.blocks, wanted)
    yield from (Refused(mesh, why) for mesh, why in reasons if why is not None)


def guesses(prices: Prices, wanted: Wanted) -> list[Estimate]:
    """The plans that are guessed to be fastest, one for each mesh that is likely to fit: from the price of one rank
    alone, so that they are there at once. What ``tp`` and ``sp`` send is not in them.
    """
    model = prices.of_model
    tried = [mesh for mesh in meshes(wanted, tried_axes(model, wanted)[0]) if impossible(mesh, model, wanted) is None]
    found = [plans_of(mesh, prices.guess, prices.blocks, wanted) for mesh in tried]
    return sorted((one.best for one in found if isinstance(one, Fitting)), key=lambda one: one.seconds)


def _guess(mesh: Mesh, prices: Prices, wanted: Wanted) -> float:
    """Seconds of a step, from the price of one rank; infinite where nothing is likely to fit."""
    found = plans_of(mesh, prices.guess, prices.blocks, wanted)
    return found.best.seconds if isinstance(found, Fitting) else math.inf


def plans_of(mesh: Mesh, price_of: PriceOf, blocks: int, wanted: Wanted) -> Fitting | Refused:
    """The plans that fit ``mesh``, fastest first; of equal ones that with the lowest ZeRO stage.

    More is recomputed only as long as no plan fits that divides nothing but what the mesh does: it would be slower.
    """
    tried: list[Estimate] = []
    for recompute in _choices("recompute", RECOMPUTE, wanted):
        for plan, rows in _plans(mesh, wanted, recompute):
            price = price_of(mesh, plan)
            if isinstance(price, Price):
                tried.append(estimate(mesh, plan, rows, price, blocks, wanted.optimizer, wanted.node_size))
            elif plan.sequence == wanted.plan.sequence:
                return Refused(mesh, f"{within_stage(mesh)}: {price}")
        fitting = [one for one in tried if wanted.device.over(one.memory) <= 0]
        if any(one.plan.zero == min(_zeros(mesh, wanted)) for one in fitting):
            break
    if not fitting:
        return too_large(min(tried, key=lambda one: one.memory), wanted)
    return Fitting(mesh, tuple(sorted(fitting, key=lambda one: (one.seconds, one.plan.zero))))


def too_large(least: Estimate, wanted: Wanted) -> Refused:
    over = size_text(wanted.device.over(least.memory))
    return Refused(least.mesh, f"memory: {over} too much, at least ({in_words(least)}: {size_text(least.memory)})")


def _plans(mesh: Mesh, wanted: Wanted, recompute: Any) -> Iterator[tuple[Plan, int]]:
    """Plans to try, and the rows of a microbatch on a rank."""
    here = wanted.rows // data_ways(mesh)
    forms = ("none", "megatron") if mesh.size("tp") > 1 else ("none",)
    for zero in _zeros(mesh, wanted):
        for form in _choices("sequence", forms, wanted):
            for rows in ROWS:
                if here % rows == 0 and here // rows >= mesh.size(PIPELINE):
                    choices = {"zero": zero, "recompute": recompute, "sequence": form}
                    yield replace(wanted.plan, microbatches=here // rows, **choices), rows


def _zeros(mesh: Mesh, wanted: Wanted) -> Sequence[int]:
    splits = mesh.shard_axis() is not None and not optimizer_named(wanted.optimizer).whole_only
    return _choices("zero", ZERO if splits else (0,), wanted)


def _choices(name: str, usual: Sequence[Any], wanted: Wanted) -> Sequence[Any]:
    return (getattr(wanted.plan, name),) if name in wanted.fixed else usual


def in_words(one: Estimate) -> str:
    """The choices of a plan that were made for it."""
    plan = one.plan
    named = {"zero": (plan.zero, 0), "recompute": (plan.recompute, "none"), "sequence": (plan.sequence, "none")}
    if plan.microbatches > 1:
        named[WEIGHTS] = (plan.microbatch_weights, "exact")
    words = [f"{name}={value}" for name, (value, usual) in named.items() if value != usual]
    return " ".join([*words, f"microbatches={plan.microbatches}"])
