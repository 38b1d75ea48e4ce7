"""``.pt2``: a rank as ``torch.export`` saves programs, to be loaded with nothing but torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from autopar.errors import ExportError
from autopar.exporters import functional
from autopar.exporters.counts import write_counts
from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.job import Job
from autopar.exporters.rank_module import Part, constants_of, parts_of, rank_tensors
from autopar.exporters.references import references
from autopar.exporters.state import weights_of
from autopar.exporters.traced import Traced, traced
from autopar.exporters.wiring import describe_backward, describe_part, groups_of
from autopar.ir.node import value
from autopar.ir.program import PipelinedProgram
from autopar.schedules.text import format_schedule

FOREIGN = "autopar"  # a namespace of operators that plain torch does not have


def write(job: Job) -> Mapping[str, Any]:
    """One file for each rank and stage, whose state are the rank's own tensors (without data where weights are none).

    With ``training`` a file is a step; that of a pipeline is many calls of its stages, whose forward and backward
    graphs are files of their own. Raises ExportError for an operator of autopar that has no plain form.
    """
    training = job.options.training
    if training and isinstance(job.program, PipelinedProgram):
        return write_stages(job, job.program)
    roles: dict[tuple[int, int], Traced] = {}
    entries = []
    for part in parts_of(job.program, job.ranks):
        if part.role not in roles:
            job.told(f"tracing {part.name}")
            roles[part.role] = plainly_traced(part, "step" if training else "inference", job.sizes)
        role = roles[part.role]
        job.told(f"writing {part.name}.pt2")
        fill(role, part, job)
        torch.export.save(role.exported, job.directory / f"{part.name}.pt2")
        entry = describe_part(part, role, f"{part.name}.pt2", job.sizes)
        if training:
            entry["gradients"] = list(part.program.required_role.grads)
        if job.weights == "reference" and job.tensors is not None:
            entry["weights"] = references(part, job.tensors)
        entries.append({**entry, "groups": groups_of(part, group_names(role.exported))})
    return {"parts": entries}


def write_stages(job: Job, program: PipelinedProgram) -> Mapping[str, Any]:
    """``rank0-stage0-forward.pt2`` and ``rank0-stage0-backward.pt2``, and so on; and the order of their calls.

    ``counts.pt2`` gives what a microbatch contributes to the sums over the batch that weigh its loss.
    Raises ExportError for a family: what forward keeps for backward has dims (``b*s``) that are none of torch.export's.
    """
    if job.sizes is not None:
        raise ExportError(
            "a training step on a pipeline is two files, and what passes between them has dims like b*s, which "
            "torch.export cannot declare\n"
            "Way out: leave out training; a mesh without pp; or export(family.member({'b': ..., 's': ...}), ...)."
        )
    roles: dict[tuple[tuple[int, int], str], Traced] = {}
    entries = []
    for part in parts_of(program, job.ranks):
        halves = ("forward", "backward") if part.program.required_role.backward is not None else ("forward",)
        _refuse_unknown_sizes(part)
        for half in halves:
            if (part.role, half) not in roles:
                job.told(f"tracing {half} of {part.name}")
                roles[part.role, half] = plainly_traced(part, half)
            exported = roles[part.role, half].exported
            held = {**constants_of(part), **weights_of(part, job)} if half == "forward" else {}
            state = exported.state_dict
            state |= {**rank_tensors(part, roles[part.role, half].own), **held}
            job.told(f"writing {part.name}-{half}.pt2")
            torch.export.save(exported, job.directory / f"{part.name}-{half}.pt2")
        entry = describe_part(part, roles[part.role, "forward"], f"{part.name}-forward.pt2")
        entry["saved"] = part.program.required_role.saved
        if len(halves) > 1:
            entry["backward"] = describe_backward(part, f"{part.name}-backward.pt2")
        if job.weights == "reference" and job.tensors is not None:
            entry["weights"] = references(part, job.tensors)
        names = [name for half in halves for name in group_names(roles[part.role, half].exported)]
        entries.append({**entry, "groups": groups_of(part, names)})
    schedule = program.required_schedule
    about = {"microbatches": schedule.microbatches, "schedule": format_schedule(schedule).splitlines()}
    return {"parts": entries, **about, **({"counts": write_counts(job, program)} if program.is_weighed else {})}


def _refuse_unknown_sizes(part: Part) -> None:
    """A file's inputs have sizes: a backward graph cannot take rows whose number is known at run time only."""
    backward = part.program.required_role.backward
    for node in backward.nodes if backward is not None else ():
        if node.op == "placeholder" and value(node).layout.ragged:
            raise ExportError(
                f"{part.name}: backward takes '{node.name}', rows of experts, as many as are sent to this rank\n"
                "Way out: Plan(capacity_factor=...), which gives experts equal parts; or a mesh without pp or ep."
            )


def plainly_traced(part: Part, runs: str, sizes: DynamicSizes | None = None) -> Traced:
    """A role in operators of torch alone."""
    found = traced(part, runs=runs, sizes=sizes)
    _only_torch(found.exported)
    found.exported.example_inputs = None  # they have no data
    return found


def fill(role: Traced, part: Part, job: Job) -> None:
    """Let the role's state be that of a rank."""
    state = role.exported.state_dict
    state |= {**rank_tensors(part, role.own), **constants_of(part), **weights_of(part, job)}


def group_names(exported: ExportedProgram) -> Iterable[str]:
    """The groups over which the program communicates."""
    return {node.args[-1] for node in exported.graph.nodes if node.target in functional.MOVING}


def _only_torch(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == FOREIGN:
            raise ExportError(
                f"{node.name} is {node.target}, an operator of autopar that no plain one stands for\n"
                "Way out: say which model this is; its form belongs into autopar/exporters/plain_operators.py."
            )
