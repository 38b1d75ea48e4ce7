"""What an estimate is when its programs are made, of a model with few blocks."""

from __future__ import annotations

from dataclasses import replace

from autopar.analysis.footprint import sent
from autopar.compiler import finish_program, pinned, pipelined, place, retraced
from autopar.errors import AutoparError
from autopar.fitting.estimate import Estimate
from autopar.fitting.fit import Fitting, too_large
from autopar.fitting.meshes import Refused, Wanted
from autopar.fitting.prices import Prices
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram
from autopar.memory.table import memory_of
from autopar.mesh import PIPELINE

TRIES = 3  # plans of a mesh that are compiled
FEWEST = 2  # blocks of a program that is compiled to check an estimate


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
    return too_large(real, wanted)


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
    rows = one.rows * data_ways(one.mesh)
    plan = replace(one.plan, check_numerics=False)
    batch = prices.batch_of(rows * (plan.microbatches if one.mesh.is_pipelined else 1))
    program: AnyProgram
    if one.mesh.is_pipelined:
        program = pipelined(lambda part: prices.traced_call(blocks, part), one.mesh, plan, (), batch)
    else:
        known = prices.traced(blocks, rows)
        of_rows = retraced(lambda _, part: prices.traced_call(blocks, part), known, (), batch, plan)
        program = finish_program(place(pinned(known, None, of_rows=of_rows), one.mesh, plan))
    moved: dict[str, float] = {}
    for transfer in sent(program, one.mesh.world_size // 2 if one.mesh.is_pipelined else 0):  # one in the middle
        moved[transfer.axis] = moved.get(transfer.axis, 0.0) + transfer.bytes
    return memory_of(program, one.optimizer, timeline=False).largest.peak, moved
