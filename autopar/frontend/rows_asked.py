"""A model that asks how many rows a batch has, and does something else for a microbatch than for the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import InvariantError
from autopar.frontend.size_questions import questions
from autopar.ir.program import Program

ROWS, SEVERAL = "b", 4


def check_rows_asked(
    model: nn.Module, part: Mapping[str, Any], dims: Mapping[str, int], whole: int,
    traced: Callable[[Mapping[str, Any]], Program],
) -> None:  # fmt: skip
    """Raise InvariantError where the model does something else for ``part``, a microbatch, than for ``whole`` rows.

    ``dims``: the batch dim of each input that has one. The model is ``traced`` for both where a question of the user's
    code has another answer for the whole. A microbatch of one row is looked at as one of several.
    """
    rows = next((part[name].shape[dim] for name, dim in dims.items()), whole)
    if any(part[name].shape[dim] != rows for name, dim in dims.items()):
        return
    if rows == 1:  # what a pass compares with a batch of several (autopar.split.summands)
        rows, part = SEVERAL, _of_rows(part, dims, SEVERAL)
    if rows == whole:
        return
    shapes = [
        [ROWS if dims.get(name) == dim else size for dim, size in enumerate(value.shape)]
        for name, value in part.items()
        if isinstance(value, Tensor)
    ]
    asked = [one for one in questions(model, (), part, shapes, {ROWS: rows}) if one.line]
    other = [one for one in asked if not one.holds({ROWS: whole})]
    if not other or _operators(traced(part)) == _operators(traced(_of_rows(part, dims, whole))):
        return
    lines = "\n".join(f"  {one.told}" for one in other)
    raise InvariantError(
        f"the model does something else for a microbatch of {rows} rows than for the batch of {whole}: forward asks "
        f"how many rows there are\n{lines}\n"
        'Way out: Plan(microbatch_weights="rows"): the mean of the losses of the microbatches, as in accumulating '
        "gradients by hand; Plan(microbatches=1); or a forward pass that does not ask."
    )


def _operators(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def _of_rows(part: Mapping[str, Any], dims: Mapping[str, int], rows: int) -> dict[str, Any]:
    """``part`` with its first rows again and again."""
    return {
        name: value.detach().index_select(dims[name], torch.arange(rows, device=value.device) % value.shape[dims[name]])
        if name in dims
        else value
        for name, value in part.items()
    }
