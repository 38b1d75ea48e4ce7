"""Run all ranks of a program in this one process, with real collectives: a user's laptop check, the tests' basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.signature import restore_output
from autopar.ir.stacked_parameters import by_member
from autopar.ir.tables import InputKind, OutputKind, Role
from autopar.mesh import Mesh
from autopar.pipeline.microbatches import Untold
from autopar.simulator.emitted import EmittedLockstep
from autopar.simulator.lockstep import Lockstep, Ranks
from autopar.simulator.parts import Step, agree, gathered_once, joined, parts, rank_inputs


def simulate(
    program: AnyProgram,
    parameters: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backward: bool = True,
    tangents: Sequence[Tensor] | None = None,
    seed: int = 0,
    emitted: bool = True,
    wholes: Mapping[str, Tensor] | None = None,
    make: Callable[[Mesh], Lockstep] = Lockstep,
    untold: bool = False,
) -> Step:
    """One step of a differentiated program (``program.role``) on all ranks of its mesh.

    Args:
        parameters: whole parameters and buffers by name.
        args, kwargs: the call of the unmodified model, whole tensors.
        backward: False runs the inference graph.
        tangents: whole gradients of the differentiable outputs; ones by default (right for a loss).
        seed: the step's seed for dropout.
        wholes: what the call is weighed with, as a part of a batch (``InputKind.WHOLE``); by default it is the batch.
        make: gives what runs the graphs of a mesh.
        emitted: run also the code that ranks run (:mod:`autopar.simulator.emitted`), and compare. With
            ``Plan(compile="inductor")`` the results are those of that code.
        untold: take :class:`autopar.pipeline.microbatches.Untold` for outputs that microbatches do not tell.

    Raises InvariantError where ranks that should hold the same value do not, where the code gives something else than
    the graphs that it was written from, and for an output that microbatches do not tell; KeyError or ValueError for a
    tensor that is missing or of another shape.
    """
    step = _simulated(program, make, parameters, args, kwargs or {}, backward, tangents, seed, wholes)
    for leaf in () if untold else pytree.tree_leaves(step.output):
        if isinstance(leaf, Untold):
            raise leaf.error()
    if emitted:
        compiles = program.plan.compile == "inductor"
        of_code = partial(EmittedLockstep, compiles=compiles)
        run = _simulated(program, of_code, parameters, args, kwargs or {}, backward, tangents, seed, wholes)
        _refuse_other_numbers(step, run, compiles)
        if compiles:  # compiled code rounds otherwise: its numbers are those that ranks have
            step = replace(step, output=run.output, loss=run.loss, grads=run.grads, buffers=run.buffers)
    return step


def _simulated(
    program: AnyProgram,
    make: Callable[[Mesh], Lockstep],
    parameters: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backward: bool,
    tangents: Sequence[Tensor] | None,
    seed: int,
    wholes: Mapping[str, Tensor] | None,
) -> Step:
    if isinstance(program, PipelinedProgram):
        from autopar.simulator.pipelined import simulate_pipeline

        return simulate_pipeline(program, parameters, args, kwargs, backward=backward, seed=seed, make=make)
    role = program.required_role
    lockstep = make(program.mesh)
    inputs = rank_inputs(program, parameters, args, kwargs, seed, wholes=wholes)
    trains = backward and role.backward is not None
    with torch.no_grad():
        graph, inputs = gathered_once(program, role.forward if trains else role.inference, lockstep, inputs)
        with lockstep.holding(inputs):
            if not trains:
                return _step(program, lockstep, lockstep.run(graph, inputs))
            assert role.backward is not None
            saved = lockstep.run(graph, inputs)
            returned = saved[: len(program.outputs)]
            del saved[: len(program.outputs)]
            step = _step(program, lockstep, returned)
            lockstep.drop(saved)  # from now on the backward graph holds them
            saved += _tangents(program, role, returned, tangents)
            grads = _gradients(program, role, lockstep.run(role.backward, saved, "backward"))
    return replace(step, grads=grads, traffic=lockstep.traffic, peak_bytes=_peaks(lockstep))


def _refuse_other_numbers(step: Step, run: Step, compiles: bool) -> None:
    """Raise InvariantError where the emitted code (``run``) gives something else than the graphs.

    ``compiles``: by compiled regions, so that each gradient may differ by the rounding of the largest one: some, as of
    a bias of keys under a softmax, are nothing but rounding.
    """
    largest: dict[torch.dtype, float] = {}
    for grad in [grad for grad in step.grads.values() if compiles and grad.numel()]:
        largest[grad.dtype] = max(
            largest.get(grad.dtype, 0.0), float(torch.where(grad.isfinite(), grad, 0).abs().max())
        )
    for name, wanted in step.named():
        found = dict(run.named()).get(name)
        scale = largest.get(wanted.dtype, 0.0) if name.startswith("gradient of ") else 0.0
        if found is None or found.shape != wanted.shape or not agree(found, wanted, scale):
            raise InvariantError(
                f"{name}: the code that ranks run gives something else than the graph that it was written from\n"
                "Likely: a wait is missing, or memory is used again while something is still needed there. This is a "
                "fault of autopar: please report it, with autopar show."
            )


def _tangents(program: Program, role: Role, returned: list[Ranks], tangents: Sequence[Tensor] | None) -> list[Ranks]:
    nodes = program.returned
    if tangents is None:
        return [[torch.ones(part.shape, dtype=part.dtype) for part in returned[i]] for i in role.differentiable]
    assert len(tangents) == len(role.differentiable), "one tangent for each differentiable output"
    return [parts(tangent, value(nodes[i]).layout, program.mesh) for i, tangent in zip(role.differentiable, tangents)]


def _gradients(program: Program, role: Role, found: list[Ranks]) -> dict[str, Tensor]:
    """Whole gradients by name; a gradient is laid out as its parameter."""
    table = {entry.target: node for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.INPUT)}
    wholes = {
        name: joined(f"gradient of {name}", ranks, value(table[name]).layout, program.mesh)
        for name, ranks in zip(role.grads, found)
    }
    return by_member(wholes)


def _peaks(lockstep: Lockstep) -> tuple[int, ...]:
    return tuple(memory.peak for memory in lockstep.memory)


def _step(program: Program, lockstep: Lockstep, returned: list[Ranks]) -> Step:
    outputs: list[Tensor] = []
    buffers: dict[str, Tensor] = {}
    loss: Tensor | None = None
    for position, (entry, node, ranks) in enumerate(zip(program.outputs, program.returned, returned)):
        name = f"output {entry.target or node.name} ({node.name})"
        whole = joined(name, ranks, value(node).layout, program.mesh)
        if entry.kind is OutputKind.BUFFER_UPDATE:
            buffers[entry.target] = whole
            continue
        outputs.append(whole)
        loss = whole if position == program.loss else loss
    output = restore_output(program, outputs) if program.out_spec is not None else tuple(outputs)
    return Step(output, loss, {}, buffers, lockstep.traffic, _peaks(lockstep), expert_load=lockstep.loads)
