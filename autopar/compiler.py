"""The compiler from end to end: model -> trace -> passes -> differentiate -> parallel module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from autopar.autodiff.differentiate import differentiate
from autopar.frontend.trace import trace
from autopar.ir.graph_pass import Pass, run_passes
from autopar.ir.layout import Layout
from autopar.ir.program import Program, weight_layouts
from autopar.mesh import Mesh, is_pipelined
from autopar.pipeline import microbatches
from autopar.pipeline.mixed_rows import warn_of_mixed_rows
from autopar.pipeline.stages import check_same_parameters, stages_of_nodes
from autopar.plan import Plan


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
    from autopar.passes import PASSES

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
