"""The step of a program on all ranks, in the field: of one call, or of all microbatches of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import Mesh
from autopar.pipeline import microbatches
from autopar.pipeline.microbatches import Untold, told
from autopar.proof.field_tensor import NoFieldForm
from autopar.simulate import simulate
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import Step, counts_of

Named = dict[str, Any]  # name -> tensor, or an output that microbatches do not tell
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def program_step(
    program: AnyProgram,
    source: Program,
    tensors: Mapping[str, Tensor],
    call: Call,
    tangents: Sequence[Tensor] | None,
    seed: int,
    make: Callable[[Mesh], Lockstep],
    smaller: AnyProgram | None = None,
    trains: bool = True,
) -> Named:
    """Outputs, new buffers and gradients, named as :func:`autopar.proof.field_reference.reference_step` names them.

    Without ``trains`` it is a call under ``torch.no_grad()``, which has graphs of its own, and gives no gradients.

    A program of one microbatch, without a pipeline, runs as often as there are some, and its gradients are added;
    ``smaller`` runs for those that have fewer rows.
    """
    args, kwargs = call
    if not isinstance(program, PipelinedProgram) and len(rows_of_parts(program, call)) > 1:
        return _accumulated((program, smaller), source, tensors, kwargs, seed, make, trains)
    trains = trains and not (isinstance(program, PipelinedProgram) and source.loss is None)
    step = simulate(
        program,
        tensors,
        args,
        kwargs,
        backward=trains,
        tangents=tangents,
        seed=seed,
        emitted=False,
        make=make,
        untold=True,
    )
    return _named(step, source)


def rows_of_parts(program: AnyProgram, call: Call) -> tuple[int, ...]:
    """The rows of each microbatch of a call: one, where the program takes all of it at once."""
    args, kwargs = call
    if args or program.plan.microbatches == 1:
        return (1,)
    shapes = [leaf.shape for leaf in pytree.tree_leaves(kwargs) if isinstance(leaf, Tensor)]
    takes = [value(node).shape for node, _ in program.placeholders(InputKind.INPUT)]
    if not isinstance(program, PipelinedProgram) and shapes == takes:
        return (1,)
    batches = microbatches.parts((), kwargs, program.mesh, program.plan)
    return tuple(microbatches.rows(kwargs, batches, program.plan))


def _named(step: Step, source: Program) -> Named:
    outputs = [leaf for leaf in pytree.tree_leaves(step.output) if isinstance(leaf, Tensor | Untold)]
    users = [out.target for out in source.outputs if out.kind is OutputKind.USER]
    found = {f"output {target}": leaf for target, leaf in zip(users, outputs, strict=True)}
    found |= {f"buffer {name}": buffer for name, buffer in step.buffers.items()}
    return found | {f"gradient of {name}": grad for name, grad in step.grads.items()}


def _accumulated(
    programs: tuple[AnyProgram, AnyProgram | None],
    source: Program,
    tensors: Mapping[str, Tensor],
    kwargs: Mapping[str, Any],
    seed: int,
    make: Callable[[Mesh], Lockstep],
    trains: bool,
) -> Named:
    program, smaller = programs
    batches = microbatches.parts((), kwargs, program.mesh, program.plan)
    rows = microbatches.rows(kwargs, batches, program.plan)
    if len(set(rows)) > 1 and smaller is None:
        raise NoFieldForm(f"microbatches of {sorted(set(rows))} rows: the program of the smaller ones was not given")
    runs = [program if smaller is None or count == rows[0] else smaller for count in rows]
    shares = microbatches.shares(rows)
    counted = [counts_of(run, tensors, (), batch, share) for run, batch, share in zip(runs, batches, shares)]
    weights = microbatches.weights(program, counted, rows)
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    buffers: list[Mapping[str, Tensor]] = []
    exact = make(program.mesh).weight
    for number, (run, batch, weight) in enumerate(zip(runs, batches, weights)):
        tangents = [exact(torch.tensor(weight.loss, dtype=torch.float64))]
        wholes = {name: exact(whole) for name, whole in weight.wholes.items()}
        found_before = microbatches.found_by_next(program, buffers[-1]) if buffers else {}
        tensors = {**tensors, **found_before}
        step = simulate(
            run, tensors, (), batch, tangents=tangents, seed=seed + number, emitted=False, make=make, wholes=wholes,
            backward=trains, untold=True,
        )  # fmt: skip
        buffers.append(step.buffers)
        for name, found in _named(replace(step, buffers={}), source).items():
            if name == _loss(source):
                found = found * weight.loss
            if name == _loss(source) or name.startswith("gradient of "):
                total[name] = total[name] + found if name in total else found
            else:
                parts.setdefault(name, []).append(found)
    joins = {f"output {target}": join for target, join in program.joins.items()}
    total |= {f"buffer {name}": new for name, new in microbatches.buffers_together(program, buffers).items()}
    return total | {name: told(name, each, joins.get(name)) for name, each in parts.items()}


def _loss(source: Program) -> str:
    return "" if source.loss is None else f"output {source.outputs[source.loss].target}"
