"""The layers that compute: all ranks, over a prime field against the traced model, and in float64 against the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.check import TOLERANCE, Reference, Report
from autopar.errors import AutoparError, TraceError
from autopar.frontend.numerics import promote_float32
from autopar.frontend.trace import trace
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import OutputKind
from autopar.plan import Plan
from autopar.proof.field_parts import traced_parts
from autopar.proof.field_proof import prove_in_field
from autopar.proof.in_double import in_double, is_exact
from autopar.proof.named_call import batch_by_name, called_by_name
from autopar.proof.refusal import Layer, Refusal, Shown
from autopar.proof.subject import MOST_ELEMENTS, Subject, elements_of, is_runnable

# of a program that takes, or gives, other things
OTHERS = (KeyError, ValueError, AssertionError, RuntimeError, TraceError)
OF_ANOTHER = "it is of another model, batch or plan than this"


def in_a_field(run: Subject) -> Shown:
    model, program, args, kwargs = run.model, run.program, run.args, run.kwargs
    if (large := _too_large(Layer.FIELD, model)) is not None:
        return large
    start = time.perf_counter()
    by_name = run.is_given and program.in_spec != pytree.tree_structure((args, dict(kwargs)))
    if by_name:
        args, kwargs = (), batch_by_name(model, args, kwargs)
    try:
        program, kwargs = called_by_name(model, program, kwargs) if by_name else (program, kwargs)
        stands = (
            not (run.is_given or run.is_derived) and not program.mesh.is_pipelined and program.plan.microbatches == 1
        )
        source = program.source if stands else _traced(model, program.plan, args, kwargs)
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        given: dict[str, Any] = {"tensors": tensors, "args": args, "kwargs": kwargs, "smaller": run.smaller}
        of_part = partial(_traced, model, program.plan, ())
        proof = prove_in_field(program, source=source, traced=traced_parts(of_part, kwargs, program), **given)
    except OTHERS as problem:
        return _refused_or_raised(Layer.FIELD, run, problem, start)
    refusals = tuple(
        Refusal(
            Layer.FIELD, f"{one.name}{f' at {one.node}' if one.node else ''}", one.problem, one.cause, one.ranks or ()
        )
        for one in proof.differences
    )
    gradients = sum(name.startswith("gradient") for name in proof.proved)
    facts = {"gradients equal": gradients, "outputs and buffers equal": len(proof.proved) - gradients}
    facts["operators without a form, taken as unknown functions"] = len(proof.unknown)
    facts = {words: count for words, count in facts.items() if count}
    unproved = proof.unproved
    if not (refusals or unproved or proof.holds):
        chance = f"that all is equal may be chance: a probability of up to {proof.bound:.0e}"
        unproved = (chance if proof.proved else "it gives nothing that could be compared",)
    return Shown(Layer.FIELD, facts, refusals, unproved, time.perf_counter() - start)


def _refused_or_raised(layer: Layer, run: Subject, problem: Exception, start: float) -> Shown:
    """The refusal of a program that was handed in, and that does not even take what the model takes."""
    if not run.is_given:
        raise problem
    words = f"it takes, or gives, other things than the model: {type(problem).__name__}: {problem}"
    refusal = Refusal(layer, "the program", words.removesuffix(": ").splitlines()[0], OF_ANOTHER)
    return Shown(layer, {}, (refusal,), seconds=time.perf_counter() - start)


def _traced(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The model as it is traced now, in the plan's precision: no program that was handed in says what it computes."""
    return trace(model, args, kwargs, plan=replace(plan, check_numerics=False))


def in_float64(run: Subject) -> Shown:
    """The laptop check: of a program that was handed in, that one in float64; else one that is compiled in float64."""
    model, program, is_given = run.model, run.program, run.is_given
    if (large := _too_large(Layer.FLOAT64, model)) is not None:
        return large
    start = time.perf_counter()
    if any(parameter.is_meta for parameter in model.parameters()):
        return Shown(Layer.FLOAT64, unproved=("the model has no weights: it is on the meta device",))
    batch = batch_by_name(model, run.args, run.kwargs)
    try:
        program, batch = called_by_name(model, program, batch) if is_given else (program, batch)
        reference = Reference(model, batch)
        with promote_float32():
            asked = in_double(program) if is_given else None
        report = reference.check(program.mesh, program.plan) if asked is None else reference.compare(asked)
    except OTHERS as problem:
        return _refused_or_raised(Layer.FLOAT64, run, problem, start)
    except AutoparError as problem:
        refusal = Refusal(Layer.FLOAT64, "the simulated step", str(problem).partition("\n")[0])
        return Shown(Layer.FLOAT64, {}, (refusal,), seconds=time.perf_counter() - start)
    wrong, right = errors_of(report)
    wrong += _left_out(reference.traced, program) if is_given else ()
    if wrong and is_given and not is_exact(program):
        words = "the program has constants in float32, which differ from the model's in float64: compile it for float64"
        return Shown(Layer.FLOAT64, unproved=(words,), seconds=time.perf_counter() - start)
    facts = {f"numbers within {TOLERANCE:g} of the model": right}
    return Shown(Layer.FLOAT64, facts, wrong, seconds=time.perf_counter() - start)


def _left_out(source: Program, program: AnyProgram) -> tuple[Refusal, ...]:
    """The outputs of the model that a program which was handed in does not give: they are compared with nothing."""
    given = {out.target for part in program.parts for out in part.outputs if out.kind is OutputKind.USER}
    missing = [out.target for out in source.outputs if out.kind is OutputKind.USER and out.target not in given]
    return tuple(Refusal(Layer.FLOAT64, f"output {name}", "the program does not give it") for name in missing)


def errors_of(report: Report) -> tuple[tuple[Refusal, ...], int]:
    """The numbers that are wrong, largest error first, and how many are right."""
    errors = {} if report.loss is None else {"the loss": report.loss}
    errors |= {f"output {name}": error for name, error in report.outputs.items()}
    errors |= {f"the gradient of '{name}'": error for name, error in report.grads.items()}
    errors |= {f"buffer '{name}'": error for name, error in report.buffers.items()}
    wrong = sorted(((error, name) for name, error in errors.items() if not error <= TOLERANCE), reverse=True)
    problem = "its error is {:.1e}, {:g} is allowed"
    found = [Refusal(Layer.FLOAT64, name, problem.format(error, TOLERANCE)) for error, name in wrong]
    return tuple(found), len(errors) - len(wrong)


def _too_large(layer: Layer, model: nn.Module) -> Shown | None:
    """What is said of a model that is too large to be run here by this layer."""
    if is_runnable(model):
        return None
    words = f"{elements_of(model):,} parameters are more than the {MOST_ELEMENTS:,} that are run here in seconds; "
    return Shown(layer, unproved=(words + "give the same model with smaller sizes, reduced=Reduced(...)",))
