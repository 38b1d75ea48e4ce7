"""The meshes for a number of devices: for each the plan that fits and is estimated to be fastest, or why none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.analysis.footprint import sent
from autopar.compiler import finish_program, pipelined, place
from autopar.errors import AutoparError
from autopar.fitting.estimate import Estimate, estimate
from autopar.fitting.prices import Price, Prices
from autopar.ir.program import AnyProgram
from autopar.ir.traffic import size_text
from autopar.memory.device import Device
from autopar.memory.table import memory_of
from autopar.mesh import PIPELINE, Mesh
from autopar.plan import Plan

ZERO, RECOMPUTE, ROWS = (0, 1, 2, 3), ("none", "selective", "full"), (1, 2, 4)
TRIES = 3  # plans of a mesh that are compiled
FEWEST = 2  # blocks of a program that is compiled to check an estimate


@dataclass(frozen=True)
class Wanted:
    """What has to fit.

    Attributes:
        devices: how many there are; ``node_size`` of them have fast links.
        rows: of the batch of a step, on all ranks together.
        fixed: choices of the plan that are not to be varied.
    """

    devices: int
    node_size: int
    rows: int
    optimizer: str
    device: Device
    plan: Plan
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Refused:
    """A mesh on which nothing fits, and why."""

    mesh: Mesh
    why: str


def meshes(wanted: Wanted) -> Iterator[Mesh]:
    """All of ``pp``, ``dp`` and ``tp``."""
    for stages in _divisors(wanted.devices):
        for ways in _divisors(wanted.devices // stages):
            sizes = {"pp": stages, "dp": wanted.devices // stages // ways, "tp": ways}
            yield Mesh(**{axis: size for axis, size in sizes.items() if size > 1} or {"dp": 1})


@dataclass(frozen=True)
class Fitting:
    """A mesh with the plans that are estimated to fit it, fastest first."""

    mesh: Mesh
    plans: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        return self.plans[0]


def fits(prices: Prices, wanted: Wanted) -> tuple[list[Fitting], list[Refused]]:
    """(the meshes on which something fits, fastest first; those on which nothing does)."""
    found, refused = [], []
    for mesh in meshes(wanted):
        why = _impossible(mesh, prices.blocks, wanted)
        one = plans_of(mesh, prices, wanted) if why is None else Refused(mesh, why)
        if isinstance(one, Fitting):
            found.append(one)
        else:
            refused.append(one)
    return sorted(found, key=lambda one: one.best.seconds), refused


def _impossible(mesh: Mesh, blocks: int, wanted: Wanted) -> str | None:
    """Why no plan can be tried, before anything is priced."""
    stages, data, ways = (mesh.size(axis) for axis in ("pp", "dp", "tp"))
    if ways > wanted.node_size:
        return f"tp={ways} goes beyond a node of {wanted.node_size}: its collectives wait between any two layers"
    if wanted.rows % data:
        return f"batch: {wanted.rows} rows do not divide by dp={data}"
    if 1 < blocks < stages:  # 1: the model has no list of blocks alike, so that the compiler has to say it
        return f"layers: {blocks} for pp={stages} stages"
    if wanted.rows // data < stages:
        return f"batch: {wanted.rows // data} rows a rank make fewer microbatches than pp={stages}"
    return None


def plans_of(mesh: Mesh, prices: Prices, wanted: Wanted) -> Fitting | Refused:
    """The plans that fit ``mesh``, fastest first; of equal ones that with the lowest ZeRO stage."""
    alone = Mesh(tp=mesh.size("tp"))
    tried: list[Estimate] = []
    for plan, rows in _plans(mesh, wanted):
        price = prices.of(alone, plan)
        if isinstance(price, Price):
            tried.append(estimate(mesh, plan, rows, price, prices.blocks, wanted.optimizer, wanted.node_size))
        elif plan.sequence == wanted.plan.sequence:
            return Refused(mesh, f"{alone}: {price}")
    fitting = [one for one in tried if wanted.device.over(one.memory) <= 0]
    if not fitting:
        return _too_large(min(tried, key=lambda one: one.memory), wanted)
    return Fitting(mesh, tuple(sorted(fitting, key=lambda one: (one.seconds, one.plan.zero))))


def _too_large(least: Estimate, wanted: Wanted) -> Refused:
    over = size_text(wanted.device.over(least.memory))
    return Refused(least.mesh, f"memory: {over} too much, at least ({in_words(least)}: {size_text(least.memory)})")


def _plans(mesh: Mesh, wanted: Wanted) -> Iterator[tuple[Plan, int]]:
    """Plans to try, and the rows of a microbatch on a rank."""
    here = wanted.rows // mesh.size("dp")
    zeros = ZERO if mesh.size("dp") > 1 else (0,)
    forms = ("none", "megatron") if mesh.size("tp") > 1 else ("none",)
    for zero in _choices("zero", zeros, wanted):
        for recompute in _choices("recompute", RECOMPUTE, wanted):
            for form in _choices("sequence", forms, wanted):
                for rows in ROWS:
                    if here % rows == 0 and here // rows >= mesh.size(PIPELINE):
                        choices = {"zero": zero, "recompute": recompute, "sequence": form}
                        yield replace(wanted.plan, microbatches=here // rows, **choices), rows


def _choices(name: str, usual: Sequence[Any], wanted: Wanted) -> Sequence[Any]:
    return (getattr(wanted.plan, name),) if name in wanted.fixed else usual


def in_words(one: Estimate) -> str:
    """The choices of a plan that were made for it."""
    plan = one.plan
    named = {"zero": (plan.zero, 0), "recompute": (plan.recompute, "none"), "sequence": (plan.sequence, "none")}
    words = [f"{name}={value}" for name, (value, usual) in named.items() if value != usual]
    return " ".join([*words, f"microbatches={plan.microbatches}"])


# ---------------------------------------------------------------- compiled


def compiled(one: Fitting, prices: Prices, wanted: Wanted) -> Estimate | Refused:
    """The fastest plan of a mesh that fits when it is compiled.

    Where one does not after all, the next is tried of which the estimate, put right by as much, fits.
    """
    ratio, real = 1.0, None
    tries = 0
    for plan in one.plans:
        if tries == TRIES or wanted.device.over(int(ratio * plan.memory)) > 0:
            continue
        tries += 1
        real = counted(plan, prices)
        if isinstance(real, Refused) or wanted.device.over(real.memory) <= 0:
            return real
        ratio = max(ratio, real.memory / plan.memory)
    assert isinstance(real, Estimate), "the first plan is tried"
    return _too_large(real, wanted)


def counted(one: Estimate, prices: Prices) -> Estimate | Refused:
    """The same with memory and bytes of real programs of two depths, from which those of the whole depth follow.

    Of each stage one and two blocks (without a pipeline two and three) are compiled: what a rank holds and sends grows
    by the same for every further block. What stages pass on does not, and so few blocks may be cut elsewhere than all
    are: those bytes stay the closed form's, of a cut between blocks (inside one, two or three tensors are passed on).
    """
    stages = one.mesh.size(PIPELINE)
    few, more = (stages, 2 * stages) if stages > 1 else (FEWEST, FEWEST + 1)
    try:
        if not prices.depth.blocks or prices.blocks <= more:
            memory, moved = _counted(one, prices, prices.blocks)
            return replace(one, memory=memory, sent=moved, compiled=True)
        less, moved_less = _counted(one, prices, few)
        larger, moved = _counted(one, prices, more)
    except (AutoparError, ValueError) as problem:
        return Refused(one.mesh, str(problem).strip().splitlines()[0])
    steps = -(-(prices.blocks - more) // stages)  # further blocks of the stage that has most
    per = 1 if stages > 1 else more - few
    total = {axis: size + steps * (size - moved_less.get(axis, 0.0)) / per for axis, size in moved.items()}
    total |= {axis: size for axis, size in one.sent.items() if axis == PIPELINE}
    return replace(one, memory=int(larger + steps * (larger - less) / per), sent=total, compiled=True)


def _counted(one: Estimate, prices: Prices, blocks: int) -> tuple[int, dict[str, float]]:
    """Of a model with so many blocks: the peak, and the bytes that a rank sends by axis."""
    rows = one.rows * one.mesh.size("dp")
    plan = replace(one.plan, check_numerics=False)
    known = prices.traced(blocks, rows)
    program: AnyProgram
    if one.mesh.is_pipelined:
        program = pipelined(lambda _: known, one.mesh, plan, (), prices.batch_of(rows * plan.microbatches))
    else:
        program = finish_program(place(known, one.mesh, plan))
    moved: dict[str, float] = {}
    times = 1 if one.mesh.is_pipelined else plan.microbatches
    for transfer in sent(program, one.mesh.world_size // 2 if one.mesh.is_pipelined else 0):  # one in the middle
        once = transfer.axis == "dp" and plan.zero < 2
        moved[transfer.axis] = moved.get(transfer.axis, 0.0) + transfer.bytes * (1 if once else times)
    return memory_of(program, one.optimizer, timeline=False).largest.peak, moved


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
