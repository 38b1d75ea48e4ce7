"""Whether a model computes across rows of its batch: then a batch in microbatches is another computation.

Contrastive losses compare all rows, load-balancing losses of experts multiply means over them. A split of the batch
over ranks shows it: values that the ranks would have to gather, or to sum beside the loss and its counts, mix rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from autopar.errors import AutoparError
from autopar.ir import collectives as comm
from autopar.ir.batch import batch_dims
from autopar.ir.node import origin, value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh

SHOWN = 3
GATHERS = comm.started_too(comm.GATHERS)
AXIS = "dp"


def warn_of_mixed_rows(traced: Program, split: Callable[[Program, Mesh], AnyProgram]) -> None:
    """Warn, with the places, if a program mixes rows and runs on ``traced.plan.microbatches``.

    ``split`` splits the batch of a program over a mesh. A microbatch of one row shows nothing, and passes.
    """
    count, rows = traced.plan.microbatches, _rows(traced)
    ways = next((ways for ways in range(2, rows + 1) if rows % ways == 0), 1)
    if count == 1 or ways == 1:
        return
    try:
        known = normalised(traced)  # ``cut_stages`` warns of these
        places = [place for place in dict.fromkeys(_places(split(traced, Mesh(dp=ways)))) if place not in known]
    except (AutoparError, ValueError):
        return  # compiling the model for its own mesh reports the error
    if places:
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        warnings.warn(
            f"{', '.join(places[:SHOWN])}{more}: computed of several rows of the batch at once, here of the rows of "
            f"each of {count} microbatches, so that results are not those of the whole batch\n"
            "Way out: Plan(microbatches=1), or compute this part on the whole batch in your own loop.",
            stacklevel=3,
        )


def _rows(program: Program) -> int:
    shapes = [(entry.target, value(node).shape) for node, entry in program.placeholders(InputKind.INPUT)]
    dims = batch_dims(shapes, program.plan.batch_dims)
    return next((shape[dim] for (_, shape), dim in zip(shapes, dims) if dim is not None), 1)


def _places(program: AnyProgram) -> Iterator[str]:
    """The places where activations are gathered or, except scalars, summed over the rows."""
    for node in program.graph.nodes:
        if comm.moving(node.target) is None or node.args[1] != AXIS or not value(node).dtype.is_floating_point:
            continue
        if node.target in GATHERS or value(node).shape:
            yield origin(node).module or node.name


def normalised(traced: Program) -> frozenset[str]:
    """Modules that normalise by statistics of the whole batch."""
    return frozenset(origin(node).module for node in traced.graph.nodes if "batch_norm" in str(node.target))
