"""Choices that would do nothing: on a mesh without the axis that they are about, or for a name that there is not.

They are errors, since whoever made them believes that something is split, sharded or cut that is not. An axis of size 1
is enough: a script is tried on one rank with the plan that it has on many.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE, SEQUENCE, SHARD_AXES, TENSOR, Mesh
from autopar.plan import Plan

NEAR = 3  # names that are shown


def check_choices(mesh: Mesh, plan: Plan) -> None:
    """Raise ValueError for a choice about an axis that ``mesh`` does not have."""
    for choice, axes, does in _about_axes(plan):
        if not any(axis in mesh.names for axis in axes):
            several = f"one of {', '.join(axes)}" if len(axes) > 1 else f"an axis {axes[0]}"
            raise ValueError(
                f"Plan({choice}) does nothing on {mesh}: it {does}\n"
                f"Way out: a mesh with {several}, of any size (1 too), or a plan without it."
            )


def _about_axes(plan: Plan) -> Iterator[tuple[str, Sequence[str], str]]:
    """The choices that differ from the usual ones: as they are written, axes of which they need one, what they do."""
    if plan.zero:
        yield f"zero={plan.zero}", SHARD_AXES, "splits states over ranks that have the same parameters"
    if plan.sequence != "none":
        yield f"sequence={plan.sequence!r}", (TENSOR,), "splits what lies between layers over tp"
    for pattern, form in plan.tensor.items():
        if form != "replicate":
            yield f"tensor={{{pattern!r}: {form!r}}}", (TENSOR,), "splits weights over tp"
    if plan.attention != "auto":
        yield f"attention={plan.attention!r}", (SEQUENCE,), "is for a sequence in parts"
    usual = Plan()
    for name, does in (
        ("cuts", "cuts a model into pipeline stages"),
        ("stage_memory_gb", "limits pipeline stages"),
        ("virtual_stages", "is the number of pipeline stages on a rank"),
        ("schedule", "is the order of pipeline stages"),
    ):
        value: Any = getattr(plan, name)
        if value != getattr(usual, name):
            yield f"{name}={value!r}", (PIPELINE,), does


def check_names(program: Program) -> None:
    """Raise ValueError for a pattern of ``Plan(tensor=...)`` that matches nothing, and for dims of an unknown input.

    ``program``: the whole model, as traced.
    """
    parameters = [
        name for _, entry in program.placeholders(InputKind.PARAMETER) for name in (entry.target, *entry.aliases)
    ]
    for pattern in program.plan.tensor:
        if not fnmatch.filter(parameters, pattern):
            raise ValueError(_unknown(f"tensor={{{pattern!r}: ...}}", "parameter", pattern, parameters))
    inputs = [entry.target for _, entry in program.placeholders(InputKind.INPUT)]
    for choice, given in (("batch_dims", program.plan.batch_dims), ("sequence_dims", program.plan.sequence_dims)):
        for name in given:
            if name not in inputs:
                raise ValueError(_unknown(f"{choice}={{{name!r}: ...}}", "input", name, inputs))


def _unknown(choice: str, what: str, name: str, known: Sequence[str]) -> str:
    near = _near(name, known) or known[:NEAR]
    names = ", ".join(f"'{each}'" for each in near) or f"none: the model has no {what}"
    return f"Plan({choice}) does nothing: no {what} of the model has that name\nWay out: near names are {names}."


def _near(name: str, known: Iterable[str]) -> list[str]:
    """By likeness of the name without its wildcards to whole names, and to their last parts."""
    plain = name.strip("*").replace("*", "").strip(".")
    ends: dict[str, str] = {}
    for each in known:
        parts = each.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), each)
    found = get_close_matches(plain, ends, NEAR, 0.5)
    return list(dict.fromkeys(ends[end] for end in found))
