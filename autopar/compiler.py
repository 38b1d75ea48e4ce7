"""The compiler from end to end: a model is traced, then run through the phases that ``passes/__init__.py`` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autopar.choices import check_choices, check_names
from autopar.errors import check_kind
from autopar.frontend.fingerprint import fingerprint
from autopar.frontend.rows_asked import check_rows_asked
from autopar.frontend.trace import trace
from autopar.ir.asked_of_inputs import answers_of
from autopar.ir.batch import batches_of_rows
from autopar.ir.collection import no_collection
from autopar.ir.graph_pass import run_phases, steps_of
from autopar.ir.layout import Layout
from autopar.ir.made_buffers import made_buffers_of
from autopar.ir.program import AnyProgram, PipelinedProgram, Program, weight_layouts
from autopar.ir.tables import Pins
from autopar.mesh import Mesh
from autopar.observation.observation import guards_of_traces
from autopar.passes import COMPILER, differentiate
from autopar.passes.cut_stages import cut_stages
from autopar.passes.weigh_microbatches import weigh_microbatches
from autopar.pipeline import microbatches
from autopar.pipeline.at_home import Homes
from autopar.pipeline.stages import check_same_cut, homes_of, stages_of_nodes
from autopar.plan import Plan

LOOKED_AT = "values in tensors that Python looks at"


def compile_program(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    homes: Homes | None = None,
    like: AnyProgram | None = None,
) -> AnyProgram:
    """The differentiated program of ``model(*args, **kwargs)`` on ``mesh``; needs no process group.

    ``layouts``: parameter layouts that are pinned, since the parameters are held so already; ``homes``: the pipeline
    stages that hold them; ``like``: a program of this model for a batch of other sizes, which decides alike where it
    can. Raises TraceError, UnknownOperatorError, IndivisibleError, InvariantError, NumericsError.
    """
    check_arguments(model, mesh, plan, args, kwargs)
    plan = plan or Plan()
    check_choices(mesh, plan)
    known = fingerprint(model, args, kwargs or {})
    with no_collection(), guards_of_traces() as guards:
        program = _compiled(model, mesh, plan, args, kwargs, layouts, homes, like)
    seen = "; ".join(f"{look.line} ({look.seen})" for values in guards.values for look in values.looks)
    asked = sorted(set(guards.inputs))
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs or {})))
    known = replace(known, call=known.call.of_inputs(asked, answers_of(asked, leaves)))
    if guards.ask_for_gradients:
        known = replace(known, call=known.call.asked(torch.is_grad_enabled()))
    if seen:  # no model has that, so such a program serves the process that made it alone
        known = replace(known, code={**known.code, LOOKED_AT: seen})
    return replace(program, fingerprint=known, made_buffers=made_buffers_of(model, program))


def _compiled(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    layouts: Mapping[str, Layout] | None,
    homes: Homes | None,
    like: AnyProgram | None,
) -> AnyProgram:
    def traced(batch: Mapping[str, Any]) -> Program:
        return trace(model, (), batch, plan=plan)

    if mesh.is_pipelined:
        program: AnyProgram = pipelined(traced, mesh, plan, args, kwargs, layouts, homes, like)
    else:
        program = finish_program(split_program(model, mesh, plan, args, kwargs, layouts, like=like))
    if plan.microbatches > 1 and plan.microbatch_weights != "rows":
        _check_rows_asked(model, mesh, plan, args, kwargs or {}, traced)
    return program


def _check_rows_asked(
    model: nn.Module, mesh: Mesh, plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any],
    traced: Callable[[Mapping[str, Any]], Program],
) -> None:  # fmt: skip
    """Raise InvariantError where the model asks how many rows there are, see :mod:`autopar.frontend.rows_asked`.

    On a pipeline the call is the whole batch; else it is one of its microbatches, which are as even as possible.
    """
    if args:
        return
    batches = microbatches.parts(args, kwargs, mesh, plan) if mesh.is_pipelined else [dict(kwargs)]
    rows = microbatches.rows(kwargs, batches, plan)
    whole = sum(rows) if mesh.is_pipelined else rows[0] * plan.microbatches
    check_rows_asked(model, batches[0], microbatches.cut_dims(batches[0], plan), whole, traced)


def pipelined(
    traced: Callable[[Mapping[str, Any]], Program],
    mesh: Mesh,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    homes: Homes | None = None,
    like: AnyProgram | None = None,
) -> PipelinedProgram:
    """The program of one microbatch of the whole batch in ``kwargs``, with that of a smaller last microbatch.

    ``traced`` gives the program of one microbatch before any pass. Raises what :func:`compile_program` raises.
    """
    batches = microbatches.parts(args, kwargs or {}, mesh, plan)
    first, last = batches[0], batches[-1]
    plan = replace(plan, microbatches=len(batches))  # of few rows there are fewer
    with microbatches.explained(kwargs or {}, first, plan):
        one = traced(first)
    of_rows = retraced(lambda _, batch: traced(batch), one, (), first, plan)
    at = stages_of_nodes(like) if isinstance(like, PipelinedProgram) else None
    program = _finished_pipeline(pinned(one, layouts, at, homes, of_rows, like), mesh, plan)
    if microbatches.rows(first, [first], plan) == microbatches.rows(first, [last], plan):
        return program
    held = {**(layouts or {}), **weight_layouts(program)}
    small = pinned(traced(last), held, stages_of_nodes(program), homes or homes_of(program), of_rows, like)
    tail = _finished_pipeline(small, mesh, plan)
    check_same_cut(program, tail)
    return replace(program, tail=tail)


def _finished_pipeline(traced: Program, mesh: Mesh, plan: Plan) -> PipelinedProgram:
    program = finish_program(place(traced, mesh, plan))
    assert isinstance(program, PipelinedProgram), f"{mesh} has an axis pp"
    return program


def retraced(
    again: Callable[[Sequence[Any], Mapping[str, Any]], Program],
    known: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plan: Plan,
) -> Callable[[int], Program]:
    """What traces the call of ``known`` ``again`` with any number of rows, up to the pass that asks for it."""

    def traced(rows: int) -> Program:
        resized = batches_of_rows(replace(known, plan=plan), args, kwargs, rows)  # one trace serves many plans
        program: AnyProgram = replace(again(*resized), mesh=Mesh(), plan=plan)
        for _, step in steps_of(COMPILER, until=weigh_microbatches.name)[:-1]:
            program = step(program)  # not run_phases: a failure leaves no evidence behind, it only ends the question
        assert isinstance(program, Program)
        return program

    return traced


def check_arguments(model: object, mesh: object, plan: object, args: object, kwargs: object) -> None:
    """Raise ValueError for an argument of another kind than :func:`compile_program` takes."""
    check_kind("model", model, nn.Module, "a module that was built: compile_program(Net(), autopar.Mesh(dp=2))")
    check_kind("mesh", mesh, Mesh, "autopar.Mesh(dp=2, tp=2)")
    check_kind("plan", plan, Plan | None, "autopar.Plan(zero=3), for example")
    check_kind("args", args, tuple | list, "a tuple of arguments, (x,), or () and a dict by name, {'x': x}")
    check_kind("kwargs", kwargs, Mapping | None, "a dict by name, {'x': x}")


def split_program(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    *,
    after: str | None = None,
    like: AnyProgram | None = None,
) -> AnyProgram:
    """The forward program, split over all axes and cut into stages; or as it is after the pass called ``after``.

    That may be a later pass too (``"trace"``: before any). Raises ValueError for an unknown pass, and the errors of
    :func:`compile_program`.
    """
    check_arguments(model, mesh, plan, args, kwargs)
    after = after or cut_stages.name
    steps_of(COMPILER, until=after)  # an unknown pass: say so before the work
    check_choices(mesh, plan or Plan())
    if mesh.is_pipelined:
        args, kwargs = (), microbatches.parts(args, kwargs or {}, mesh, plan or Plan())[0]
    traced = trace(model, args, kwargs, mesh, plan)
    check_names(traced)
    quick = replace(plan or Plan(), check_numerics=False)

    def again(given: Sequence[Any], named: Mapping[str, Any]) -> Program:
        return trace(model, given, named, mesh, quick)

    of_rows = retraced(again, traced, args, kwargs or {}, traced.plan)
    return run_phases(pinned(_with_source(traced), layouts, of_rows=of_rows, like=like), COMPILER, until=after)


def pinned(
    traced: Program,
    layouts: Mapping[str, Layout] | None,
    stages: Mapping[str, int] | None = None,
    homes: Homes | None = None,
    of_rows: Callable[[int], Program] | None = None,
    like: AnyProgram | None = None,
) -> Program:
    """``traced`` with the decisions that the passes must keep, see :class:`autopar.ir.tables.Pins`."""
    at = {name: tuple(numbers) for name, numbers in (homes or {}).items()}
    chosen = like.decisions if like is not None else {}
    choices = {axis: {name: made.chosen for name, made in each.items()} for axis, each in chosen.items()}
    pinned = Pins(dict(layouts or {}), traced.pins.dtypes, dict(stages or {}), at, choices, of_rows)
    return replace(traced, pins=pinned)


def _with_source(traced: Program) -> Program:
    """``traced``, which keeps itself as it is now, on one rank; passes work on copies of its graph."""
    pins = replace(traced.pins, of_rows=None)  # which holds the model
    return replace(traced, source=replace(traced, mesh=Mesh(), source=None, pins=pins))


def place(traced: Program, mesh: Mesh, plan: Plan, *, after: str = cut_stages.name) -> AnyProgram:
    """A traced program, whole on every axis, split over ``mesh``; one trace serves many meshes and plans.

    ``after``: the last pass, that which cuts it into stages if it is not to be another one.
    Raises ValueError for a plan that computes in another precision than the trace, or names what is not there.
    """
    if plan.precision.param != traced.plan.precision.param:
        raise ValueError(f"traced with {traced.plan.precision}, to be placed with {plan.precision}: trace again")
    placed = replace(traced, mesh=mesh, plan=plan)
    check_names(placed)
    return run_phases(_with_source(placed), COMPILER, until=after)


def finish_program(program: AnyProgram, *, after: str | None = None) -> AnyProgram:
    """A split program with its backward pass, optimised; or as it is after the pass called ``after``.

    Raises ValueError for an unknown pass, or one from before ``differentiate``.
    """
    return run_phases(program, COMPILER, since=differentiate.name, until=after)
