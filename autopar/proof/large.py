"""A model that is too large to be executed here: the reduced one that stands for it, and why it does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.compiler import compile_program, split_program
from autopar.errors import AutoparError
from autopar.ir.batch import batches_of_rows, data_ways, input_rows
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE, Mesh
from autopar.plan import Plan
from autopar.proof.alike import decided_alike, likeness
from autopar.proof.numbers import compare_numbers
from autopar.proof.reduced import Reduced, reduced
from autopar.proof.refusal import Layer, Shown
from autopar.proof.subject import Subject, call_of, compiled, is_runnable


def reduced_of(
    asked: Reduced | bool | None,
    run: Subject,
    mesh: Mesh,
    plan: Plan,
    example_inputs: Mapping[str, Any] | Sequence[Any],
) -> Reduced | None:
    """What is executed in place of a model that is too large; None where that is the model itself."""
    if isinstance(asked, Reduced):
        return asked
    if asked is False or run.is_given or (asked is None and is_runnable(run.model)):
        return None
    found = reduced(run.model, mesh, plan, example_inputs)
    if found is None and asked:
        raise ValueError(
            f"{type(run.model).__name__} cannot be built with smaller sizes: its config has none that are known\n"
            "Way out: reduced=Reduced(small_model, small_mesh, small_inputs), of autopar.proof.reduced."
        )
    return found


def subject_of(reduced: Reduced, plan: Plan, program: AnyProgram) -> Subject:
    """The reduced model and its program, which decides as ``program``; of many microbatches a few, stages cut anew."""
    args, kwargs = call_of(reduced.example_inputs)
    few = min(plan.microbatches, 2 * reduced.mesh.size(PIPELINE))
    plan = replace(plan, check_numerics=False, microbatches=few, cuts=())
    traced = split_program(reduced.model, reduced.mesh, plan, args, kwargs, after="trace")
    assert isinstance(traced, Program)
    like = decided_alike(program, traced)
    small, smaller = compiled(reduced.model, reduced.mesh, plan, args, kwargs, like)
    return Subject(reduced.model, small, False, args, kwargs, smaller)


def on_one_rank(reduced: Reduced, plan: Plan) -> AnyProgram:
    """The program of the reduced model on one rank: of the first microbatch."""
    plan = Plan(check_numerics=False, precision=plan.precision, batch_dims=plan.batch_dims)
    args, kwargs = call_of(reduced.example_inputs)
    return compile_program(reduced.model, Mesh(), plan, args, kwargs)


def with_more_rows(reduced: Reduced, plan: Plan, program: AnyProgram) -> AnyProgram:
    """The program of the reduced model for one more row on each data rank, which decides as ``program``.

    ``program`` itself where there is none.
    """
    assert program.source is not None
    few, (args, kwargs) = program.plan.microbatches, call_of(reduced.example_inputs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dims, inputs = input_rows(program.source), program.source.placeholders(InputKind.INPUT)
    rows = next((leaf.shape[dims[node]] for leaf, (node, _) in zip(tensors, inputs) if node in dims), 0)
    try:
        more = batches_of_rows(program.source, args, kwargs, rows + few * data_ways(reduced.mesh))
        return compiled(reduced.model, reduced.mesh, replace(plan, microbatches=few, cuts=()), *more, program)[0]
    except AutoparError:
        return program


def stands_for(program: AnyProgram, small: AnyProgram, reduced: Reduced, plan: Plan) -> Shown:
    """Whether the reduced program stands for the other: its lines, and the numbers in them."""
    start = time.perf_counter()
    found = likeness(program.graph, small.graph)
    unproved: tuple[str, ...] = ()
    if found.difference:
        unproved = (f"the reduced program is another one: {found.difference}",)
    facts = {} if unproved else {"lines that are those of the reduced program": found.lines}
    facts |= {"times a block is repeated there": found.repeats} if found.repeats and not unproved else {}
    compared = compare_numbers(program, small, on_one_rank(reduced, plan), lambda: with_more_rows(reduced, plan, small))
    unproved += tuple(compared.unproved)
    if not (compared.refusals or compared.unproved):
        facts["numbers that are those of the reduced program, or grow as sizes do"] = compared.count
    return Shown(Layer.RELATIONS, facts, tuple(compared.refusals), unproved, time.perf_counter() - start)
