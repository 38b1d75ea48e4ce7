"""What is proved: a model, one call of it, and the program of these, compiled here or handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autopar.compiler import compile_program
from autopar.ir.program import AnyProgram, weight_layouts
from autopar.mesh import Mesh
from autopar.pipeline import microbatches
from autopar.plan import Plan

MOST_ELEMENTS = 1 << 23  # of parameters: what the layers that compute run in seconds


@dataclass(frozen=True)
class Subject:
    """What the layers that compute run. ``is_given``: the program was handed in. ``smaller``: see :func:`compiled`.

    ``is_derived``: the program is of a family, and so is what it says that it computes.
    """

    model: nn.Module
    program: AnyProgram
    is_given: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    smaller: AnyProgram | None = None
    is_derived: bool = False


def call_of(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def compiled(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    like: AnyProgram | None = None,
) -> tuple[AnyProgram, AnyProgram | None]:
    """The program that ranks run: of the first microbatch where there are some, and that of smaller ones."""
    plan = replace(plan, check_numerics=False)
    if mesh.is_pipelined or plan.microbatches == 1:
        return compile_program(model, mesh, plan, args, kwargs, like=like), None
    batches = microbatches.parts(args, kwargs, mesh, plan)
    rows = microbatches.rows(kwargs, batches, plan)
    first = compile_program(model, mesh, plan, (), batches[0], like=like)
    if rows[-1] == rows[0]:
        return first, None
    return first, compile_program(model, mesh, plan, (), batches[-1], layouts=weight_layouts(first), like=first)


def elements_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def is_runnable(model: nn.Module) -> bool:
    """Whether the layers that compute run this model here in seconds."""
    return elements_of(model) <= MOST_ELEMENTS
