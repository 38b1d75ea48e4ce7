"""The compiler from end to end: model -> trace -> passes -> differentiate -> parallel module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar import microbatches
from autopar.connect import Connection, connect, launched
from autopar.differentiate import differentiate
from autopar.layout import Layout
from autopar.mesh import Mesh
from autopar.mixed_rows import warn_of_mixed_rows
from autopar.module import ParallelModule
from autopar.parameters import weight_layouts
from autopar.pipeline import Pass, run_passes
from autopar.plan import Plan
from autopar.program import Program
from autopar.stages import check_same_parameters, is_pipelined, stages_of_nodes
from autopar.trace import trace


def parallelize(
    model: nn.Module,
    mesh: Mesh | DeviceMesh,
    plan: Plan | None = None,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
) -> ParallelModule:
    """``model`` as one rank of ``mesh``: a drop-in ``nn.Module`` that takes over the model's parameters.

    Under torchrun every rank calls this and then the returned module, as a script for one device would. In a process
    that was not launched (and a mesh of more than one rank) there are ``.program`` and ``.simulate(...)``.

    Args:
        example_inputs: keyword (dict) or positional (tuple) arguments of one call, to compile now rather than then.

    Raises LaunchError when the processes do not fit the mesh; what the compiler raises, see :func:`compile_program`.
    """
    plan = plan or Plan()
    named = Mesh.from_device_mesh(mesh) if isinstance(mesh, DeviceMesh) else mesh
    connection = _connection(model, mesh, plan)
    module = ParallelModule(model, named, plan, compile_program, connection)
    if isinstance(example_inputs, Mapping):
        module.prepare(**example_inputs)
    elif example_inputs is not None:
        module.prepare(*example_inputs)
    return module


def compile_program(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Program:
    """The differentiated program of ``model(*args, **kwargs)`` on ``mesh``; needs no process group.

    ``layouts``: parameter layouts that are settled already, since the parameters are held so.
    Raises TraceError, UnknownOperatorError, IndivisibleError, InvariantError, NumericsError.
    """
    plan = plan or Plan()
    if not is_pipelined(mesh):
        return finish_program(split_program(model, mesh, plan, args, kwargs, layouts))
    return pipelined(lambda batch: trace(model, (), batch, plan=plan), mesh, plan, args, kwargs, layouts)


def pipelined(
    traced: Callable[[Mapping[str, Any]], Program],
    mesh: Mesh,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Program:
    """The program of one microbatch of the whole batch in ``kwargs``, with that of a smaller last microbatch.

    ``traced`` gives the program of one microbatch before any pass. Raises what :func:`compile_program` raises.
    """
    batches = microbatches.parts(args, kwargs or {}, mesh, plan)
    first, last = batches[0], batches[-1]
    one = traced(first)
    warn_of_mixed_rows(replace(one, plan=plan), _with_split_batch)
    program = finish_program(place(replace(one, settled=dict(layouts or {})), mesh, plan))
    if microbatches.rows(first, [first], plan) == microbatches.rows(first, [last], plan):
        return program
    settled = {**(layouts or {}), **weight_layouts(program)}
    small = replace(traced(last), settled=settled, settled_stages=stages_of_nodes(program))
    remainder = finish_program(place(small, mesh, plan))
    check_same_parameters(program, remainder)
    return replace(program, remainder=remainder)


def _with_split_batch(traced: Program, mesh: Mesh) -> Program:
    program = replace(traced, mesh=mesh, plan=replace(traced.plan, zero=0, on_unknown="replicate"))
    for step in _until("split_batch", "trace", forward_passes()):
        program = step(program)  # not run_passes: a failure here leaves no evidence behind, it only ends the question
    return program


def split_program(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    *,
    after: str | None = None,
) -> Program:
    """The forward program, split over all axes; or as it is after the pass called ``after`` (``"trace"``: before any).

    Raises ValueError for an unknown pass, and what :func:`compile_program` raises.
    """
    passes = _until(after, "trace", forward_passes())
    if is_pipelined(mesh):
        args, kwargs = (), microbatches.parts(args, kwargs or {}, mesh, plan or Plan())[0]
    program = replace(trace(model, args, kwargs, mesh, plan), settled=dict(layouts or {}))
    return run_passes(program, passes)


def place(traced: Program, mesh: Mesh, plan: Plan) -> Program:
    """A traced program, whole on every axis, split over ``mesh``; one trace serves many meshes and plans.

    Raises ValueError for a plan that computes in another precision than the trace.
    """
    if plan.precision.param != traced.plan.precision.param:
        raise ValueError(f"traced with {traced.plan.precision}, to be placed with {plan.precision}: trace again")
    return run_passes(replace(traced, mesh=mesh, plan=plan), forward_passes())


def finish_program(program: Program, *, after: str | None = None) -> Program:
    """A split program with its backward pass, optimised; or as it is after the pass called ``after``
    (``"differentiate"``: before any). Raises ValueError for an unknown pass."""
    passes = _until(after, "differentiate", joint_passes())
    program = differentiate(program)
    if not program.stages:
        return run_passes(program, passes)
    program = replace(program, stages=tuple(run_passes(stage, passes) for stage in program.stages))
    return run_passes(program, pipeline_passes() if after is None else ())


def forward_passes() -> tuple[Pass, ...]:
    """The passes between tracing and differentiation, in order."""
    from autopar.passes import PASSES  # this module is the one place that looks up to the passes

    return PASSES


def joint_passes() -> tuple[Pass, ...]:
    """The passes after differentiation, in order."""
    from autopar.passes import OPTIMISATIONS

    return OPTIMISATIONS


def pipeline_passes() -> tuple[Pass, ...]:
    """The passes over all stages of a pipeline together, in order."""
    from autopar.passes import PIPELINE

    return PIPELINE


def _until(after: str | None, start: str, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    names = [start, *(step.name for step in passes)]
    if after is None:
        return passes
    if after not in names:
        raise ValueError(f"there is no pass '{after}' here; in order there are {', '.join(names)}")
    return passes[: names.index(after)]


def _connection(model: nn.Module, mesh: Mesh | DeviceMesh, plan: Plan) -> Connection | None:
    world_size = mesh.size() if isinstance(mesh, DeviceMesh) else mesh.world_size
    if not launched() and world_size != 1:
        return None
    return connect(mesh, plan.timeout, _device(model, mesh))


def _device(model: nn.Module, mesh: Mesh | DeviceMesh) -> torch.device:
    """Where this rank computes: where the parameters are; for a model on meta, the accelerator if there is one."""
    here = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(mesh, DeviceMesh) and here.type != mesh.device_type:
        here = torch.device(mesh.device_type)
    if here.type == "meta":
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if here.type == "cuda":
        if here.index is None:
            here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    return here
