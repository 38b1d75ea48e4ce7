"""What a plan takes of the model in place of the step of the whole batch: the mean of the steps of its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autopar.ir.program import AnyProgram, Program
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.proof.field_lockstep import FieldLockstep
from autopar.proof.field_reference import FieldStep, Seeds, reference_step

Trace = Callable[[int], Program]  # of the model, for a microbatch by its number
STATISTICS = (
    'with Plan(microbatch_weights="statistics") some terms of the loss are those of each microbatch, others those of '
    "the batch: the model alone has no such step to compare with"
)


def traced_parts(trace: Callable[[Mapping[str, Any]], Program], kwargs: Mapping[str, Any], of: AnyProgram) -> Trace:
    """``trace`` of the microbatches of a call of program ``of``, once for each number of rows."""

    @cache
    def of_rows(rows: int) -> Program:
        return trace(next(batch for batch, count in zip(*parts_and_rows()) if count == rows))

    def parts_and_rows() -> tuple[list[dict[str, Any]], list[int]]:
        batches = microbatches.parts((), kwargs, of.mesh, of.plan)
        return batches, microbatches.rows(kwargs, batches, of.plan)

    return lambda number: of_rows(parts_and_rows()[1][number])


def is_in_parts(plan: Plan, rows: tuple[int, ...]) -> bool:
    """Whether the step is that of each microbatch by itself."""
    return len(rows) > 1 and plan.microbatch_weights == "rows"


def takes_statistics(plan: Plan, rows: tuple[int, ...]) -> bool:
    """Whether terms of the loss may be those of each microbatch."""
    return len(rows) > 1 and plan.microbatch_weights == "statistics"


def step_in_parts(
    program: AnyProgram,
    traced: Trace,
    tensors: Mapping[str, Tensor],
    kwargs: Mapping[str, Any],
    tangents: Mapping[str, Tensor],
    seed: int,
) -> FieldStep:
    """The mean of the losses, and gradients, of the microbatches, by their rows; other outputs side by side.

    Each finds the buffers that the one before has written, as in accumulating gradients by hand.

    ``tangents``: of the loss, by its target. Raises NoFieldForm.
    """
    batches = microbatches.parts((), kwargs, program.mesh, program.plan)
    shares = microbatches.shares(microbatches.rows(kwargs, batches, program.plan))
    exact = FieldLockstep(program.mesh).weight
    weighed = {f"output {target}" for target in tangents}
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for number, (batch, share) in enumerate(zip(batches, shares)):
        step = reference_step(traced(number), tensors, (), batch, tangents, Seeds(seed + number))
        made = {name: new for name, new in step.named.items() if name.startswith("buffer ")}
        tensors = {**tensors, **{name.removeprefix("buffer "): new.detach() for name, new in made.items()}}
        for name, found in step.named.items():
            if name in weighed or name.startswith("gradient of "):
                summand = found * exact(torch.tensor(share, dtype=torch.float64))
                total[name] = total[name] + summand if name in total else summand
            elif name not in made:
                parts.setdefault(name, []).append(found)
    joined = {name: microbatches.together(name, each, None) for name, each in parts.items()}
    return FieldStep(total | joined | made, {}, {})
