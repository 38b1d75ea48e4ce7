"""What microbatches of a model count for: exactly, or, where its loss is no sum over rows, each by itself."""

from __future__ import annotations

from dataclasses import replace

from autopar.compiler import pinned, place, retraced
from autopar.errors import InvariantError
from autopar.fitting.meshes import Wanted
from autopar.fitting.prices import ROWS, SHALLOW, Prices
from autopar.mesh import Mesh

WEIGHTS, WEIGHING = "microbatch_weights", "weigh_microbatches"  # a choice of the plan, and the pass that refuses it


def settled(prices: Prices, wanted: Wanted) -> tuple[Wanted, tuple[str, ...]]:
    """``wanted`` with what microbatches of this model need, and a line that says so.

    A term of the loss that is no sum over rows, such as one that balances experts, has no exact microbatches: these are
    compiled with ``microbatch_weights="statistics"``, unless their weights are chosen.
    """
    if WEIGHTS in wanted.fixed or has_exact_microbatches(prices):
        return wanted, ()
    line = (
        f"{WEIGHTS}=statistics, where there are several: a term of the loss (a balance of experts, statistics of a "
        f"batch) is no sum over rows, and is that of each microbatch; --microbatch-weights rows|statistics chooses"
    )
    return replace(wanted, plan=replace(wanted.plan, microbatch_weights="statistics")), (line,)


def has_exact_microbatches(prices: Prices) -> bool:
    """Whether the gradients of microbatches add up to those of the batch. Nothing is compiled."""
    plan = replace(prices.plan, microbatches=2, microbatch_weights="exact")
    known = prices.traced(SHALLOW[0], ROWS)
    again = retraced(lambda _, part: prices.traced_call(SHALLOW[0], part), known, (), prices.batch_of(ROWS), plan)
    try:
        place(pinned(known, None, of_rows=again), Mesh(), plan, after=WEIGHING)
    except InvariantError as problem:
        return WEIGHTS not in str(problem)
    return True
