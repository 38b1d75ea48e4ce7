"""L0 of a proof: no run of the ranks' code can hang, mix up collectives, or read memory that is written meanwhile.

What is looked at is the Python that ranks run, read back from its text (:mod:`autopar.proof.rank_lines`), and the
schedule. All ranks of a stage run the same text, so their collectives meet one by one, and on a large mesh a stage
moves as one; on a small one, and where the code of a rank was changed, every rank is walked by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from autopar.errors import InvariantError, ScheduleError
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.levels import SCHEDULED
from autopar.mesh import PIPELINE, Mesh
from autopar.pipeline.links import links_of
from autopar.proof.rank_events import Collective, Ranks, Sending
from autopar.proof.refusal import Layer, Refusal, Shown
from autopar.proof.structure_memory import check_memory
from autopar.proof.structure_order import check_order
from autopar.proof.structure_types import Types, check_gradients
from autopar.schedules.check import check_schedule

CONTRACT = "a contract"  # where a refusal of the compiler's own contracts stands
MOST_WALKED = 64  # ranks, each by itself


def structure(program: AnyProgram, changed: Mapping[int, str] | None = None) -> Shown:
    """Check the structure of a differentiated program.

    ``changed``: the code of single ranks, as text, in place of what is emitted for them.

    Raises ProofError for text that is no code of its rank.
    """
    start = time.perf_counter()
    ranks = Ranks(program, changed)
    refusals = list(_contracts(program, ranks))
    facts: dict[str, int] = {}
    unproved: tuple[str, ...] = ()
    if not refusals:  # else its code may not even be written
        codes = list(ranks.all_codes())
        refusals += [refusal for code in codes for refusal in check_memory(code, program.mesh)]
        facts["lines of code that write no memory too early"] = sum(len(code.lines) for code in codes)
        refusals += [] if refusals else _order(ranks, facts)
        refusals += [] if refusals else _types(program, facts)
        unproved = tuple(ranks.computed_otherwise())
        if isinstance(program, PipelinedProgram) and program.tail is not None:  # the smaller last microbatches
            refusals += structure(program.tail).refusals
    return Shown(Layer.STRUCTURE, facts, tuple(refusals), unproved, time.perf_counter() - start)


def _contracts(program: AnyProgram, ranks: Ranks) -> Iterator[Refusal]:
    """The contracts of the compiler's last level, and the schedules."""
    try:
        SCHEDULED.check(program, "its last pass")
        for schedule in ranks.schedules():
            assert isinstance(program, PipelinedProgram)
            check_schedule(schedule, links_of(program))
    except ScheduleError as error:  # with the circle, line by line
        yield Refusal(Layer.STRUCTURE, CONTRACT, str(error), "a schedule that was changed")
    except InvariantError as error:
        problem, _, fix = str(error).partition("\n")
        cause = fix.removeprefix("Likely fix: ").partition("\n")[0]
        yield Refusal(Layer.STRUCTURE, CONTRACT, problem, cause)


def _order(ranks: Ranks, facts: dict[str, int]) -> Iterator[Refusal]:
    """Walk through the events of all ranks; on a large mesh, of a rank of each place, without its collectives."""
    mesh = ranks.mesh
    by_rank = mesh.world_size <= MOST_WALKED or bool(ranks.changed)
    walked = mesh if by_rank else Mesh(pp=mesh.size(PIPELINE))
    events = [ranks.of_rank(rank) if by_rank else ranks.of_place(rank) for rank in range(walked.world_size)]
    if not by_rank:
        events = [[event for event in own if not isinstance(event, Collective)] for own in events]
    yield from check_order(events, walked)
    met = [event for event in ranks.of_place(0) if isinstance(event, Collective)]
    axes = {event.axis for event in met}
    facts["collectives of a rank in a step, in one order on all"] = len(met)
    facts["groups of ranks that meet in them"] = sum(mesh.world_size // mesh.size(axis) for axis in axes)
    if isinstance(ranks.program, PipelinedProgram):
        places = range(mesh.size(PIPELINE))
        sends = sum(isinstance(event, Sending) for place in places for event in ranks.of_place(place))
        facts["messages of a step between stages, each sent and received"] = sends


def _types(program: AnyProgram, facts: dict[str, int]) -> Iterator[Refusal]:
    types = Types()
    for part in program.parts:
        for name, graph in part.required_role.graphs.items():
            yield from types.check(graph, part.mesh, name)
        yield from check_gradients(part)
    facts["lines whose operator gives the sizes and dtypes that they say"] = types.seen
    facts |= {f"{words}: of unknown type": count for words, count in types.unknown.items()}
