"""What an estimate is when its programs are made, of a model with few blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from autopar.analysis.footprint import sent
from autopar.compiler import finish_program, pinned, place, retraced
from autopar.errors import AutoparError
from autopar.fitting.estimate import Estimate
from autopar.fitting.fit import Fitting, too_large
from autopar.fitting.meshes import Refused, Wanted
from autopar.fitting.prices import Prices
from autopar.fitting.repeated import BLOCKS, NotAlike
from autopar.fitting.stages import Shallow
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.memory.table import memory_of
from autopar.mesh import PIPELINE
from autopar.pipeline.links import links_of
from autopar.pipeline.planned_schedule import most_in_flight, planned_schedule
from autopar.schedules.messages import with_messages

TRIES = 3  # plans of a mesh that are compiled
BEFORE_THE_CUT = "cast_parameters"  # the pass before that which cuts
WAVES = 3  # microbatches for each stage of a pipeline: to fill it, in its steady state, and to empty it
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

    What a rank holds and sends grows by the same for every further block. Without a pipeline, programs of two and three
    blocks are made; on one the whole model is cut, and programs whose stages have one and two whole blocks are made,
    cut where the whole is (:mod:`autopar.fitting.stages`). Bytes are those of a rank in the middle of the pipeline.
    """
    try:
        if one.mesh.is_pipelined and prices.blocks > BLOCKS:
            with suppress(NotAlike):
                return _by_stages(one, prices)
        return _by_depth(one, prices)
    except (AutoparError, ValueError) as problem:
        return Refused(one.mesh, _with_way_out(str(problem)))


def _with_way_out(text: str) -> str:
    """The first line, and where another choice of the plan is a way out, the first of those."""
    first, *others = text.strip().splitlines()
    ways = (line.partition(";")[0] for line in others if line.startswith("Way out: Plan("))
    return " ".join([first, *(f"({way})" for way in ways)])


@dataclass(frozen=True)
class _Count:
    """Of each pipeline place the peak; of the rank in the middle the bytes that it sends, by axis."""

    peaks: tuple[int, ...]
    sent: Mapping[str, float]

    @classmethod
    def of(cls, program: AnyProgram, optimizer: str) -> _Count:
        middle = program.mesh.world_size // 2 if program.mesh.is_pipelined else 0
        moved = defaultdict[str, float](float)
        for transfer in sent(program, middle):
            moved[transfer.axis] += transfer.bytes
        table = memory_of(few_microbatches(program), optimizer, timeline=False)
        return cls(tuple(rank.peak for rank in table.ranks), moved)

    def deeper(self, less: _Count, steps: float) -> _Count:
        """With so many times more of what this has beyond ``less``."""
        axes = dict.fromkeys((*self.sent, *less.sent))
        moved = {
            axis: self.sent.get(axis, 0.0) + steps * (self.sent.get(axis, 0.0) - less.sent.get(axis, 0.0))
            for axis in axes
        }
        return _Count(tuple(int(a + steps * (a - b)) for a, b in zip(self.peaks, less.peaks)), moved)


def few_microbatches(program: AnyProgram) -> AnyProgram:
    """The same with as many as fill its pipeline and show it in its steady state: what follows only repeats that.

    With a schedule by which a stage holds all microbatches at once, they are as many as they were.
    """
    if not isinstance(program, PipelinedProgram) or ":" in program.plan.schedule:
        return program
    few = WAVES * len(program.stages)
    if program.plan.microbatches <= few:
        return program
    plan = replace(program.plan, microbatches=few)
    schedule = planned_schedule(plan, program.mesh)
    if most_in_flight(schedule) != most_in_flight(program.required_schedule):
        return program
    if not schedule.has_messages:
        schedule = with_messages(schedule, links_of(program))
    return replace(program, plan=plan, schedule=schedule)


def _of(one: Estimate, count: _Count) -> Estimate:
    return replace(one, memory=max(count.peaks), sent=dict(count.sent), compiled=True)


def _by_stages(one: Estimate, prices: Prices) -> Estimate:
    base = place(_traced(one, prices, BLOCKS), one.mesh, replace(one.plan, check_numerics=False), after=BEFORE_THE_CUT)
    assert isinstance(base, Program)
    stages = Shallow(base, prices.depth.name, prices.blocks)
    if stages.spare < 2:
        return _of(one, _Count.of(stages.compiled(0), one.optimizer))
    less, more = (_Count.of(stages.compiled(stages.spare - number), one.optimizer) for number in (0, 1))
    return _of(one, more.deeper(less, stages.spare - 1))


def _by_depth(one: Estimate, prices: Prices) -> Estimate:
    stages = one.mesh.size(PIPELINE)
    few, more = (stages, 2 * stages) if stages > 1 else (FEWEST, FEWEST + 1)
    if not prices.depth.blocks or prices.blocks <= more:
        return _of(one, _whole(one, prices, prices.blocks))
    less, larger = _whole(one, prices, few), _whole(one, prices, more)
    steps = -(-(prices.blocks - more) // stages)  # further blocks of the stage that has most
    return _of(one, larger.deeper(less, steps))


def _whole(one: Estimate, prices: Prices, blocks: int) -> _Count:
    """Of a model with so many blocks, as the compiler cuts it."""
    split = place(_traced(one, prices, blocks), one.mesh, replace(one.plan, check_numerics=False))
    return _Count.of(finish_program(split), one.optimizer)


def _traced(one: Estimate, prices: Prices, blocks: int) -> Program:
    """One microbatch of a model with so many blocks, before any pass."""
    rows = one.rows * data_ways(one.mesh)
    known = prices.traced(blocks, rows)
    batch = prices.batch_of(rows)
    return pinned(
        known, None, of_rows=retraced(lambda _, part: prices.traced_call(blocks, part), known, (), batch, one.plan)
    )
