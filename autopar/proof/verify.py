"""Prove, before a device is touched, that the programs of all ranks compute the unmodified model's step.

Four layers, none of which believes what a pass has written:

    structure   no run can hang, mix up collectives, or read memory that is written meanwhile
    relations   loss and gradients are the same on all ranks that hold the same, and no sum counts anything twice
    field       all ranks, executed exactly over a prime field, give the traced model's outputs and gradients
    float64     all ranks, simulated by the code that they run, give the model's own numbers to 1e-10
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.check import TOLERANCE, Reference, Report
from autopar.compiler import compile_program, split_program
from autopar.errors import AutoparError, TraceError, check_kind
from autopar.frontend.numerics import promote_float32
from autopar.frontend.trace import trace
from autopar.ir.program import AnyProgram, Program, weight_layouts
from autopar.ir.tables import OutputKind
from autopar.mesh import PIPELINE, Mesh
from autopar.notes import warn
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.proof.alike import decided_alike, likeness
from autopar.proof.field_proof import prove_in_field
from autopar.proof.in_double import in_double, is_exact
from autopar.proof.named_call import batch_by_name, called_by_name
from autopar.proof.numbers import compare_numbers
from autopar.proof.reduced import Reduced
from autopar.proof.reduced import reduced as reduced_of
from autopar.proof.refusal import Layer, Refusal, Shown
from autopar.proof.relations import relations
from autopar.proof.report import Verification
from autopar.proof.structure import CONTRACT, structure

LAYERS = tuple(Layer)


OTHERS = (
    KeyError,
    ValueError,
    AssertionError,
    RuntimeError,
    TraceError,
)  # of a program that takes, or gives, other things
MOST_ELEMENTS = 1 << 23  # of parameters: what the layers that compute run in seconds


def verify(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    program: AnyProgram | None = None,
    codes: Mapping[int, str] | None = None,
    layers: Collection[str] = LAYERS,
    reduced: Reduced | bool | None = None,
) -> Verification:
    """Prove the program of ``model`` on ``mesh``, or refuse it: with the node, two ranks, and the likely cause.

    Args:
        model: unmodified; weights may be on the meta device, but for the layer ``float64``.
        example_inputs: keyword (dict) or positional (tuple) arguments of one call: the whole batch.
        program: any program for this model, mesh and batch, in place of the one that is compiled here: from a file,
            or edited as text and parsed again.
        codes: the code of single ranks as text, changed by hand (``program.rank(3).code``); without a pipeline.
        layers: which of ``structure``, ``relations``, ``field``, ``float64`` to try.
        reduced: what the layers that compute execute in place of a model that is too large: its program has to be
            that of ``model`` but for sizes and the number of equal blocks. None: where that is so, ``model`` is built
            anew from its ``config``, with smaller sizes; True: always; False: never. Not for a ``program`` that is
            handed in.

    Returns what was shown and what is refused; it raises nothing for a wrong program. Raises ValueError for arguments
    of another kind, and the errors of the compiler for a model that cannot be compiled.
    """
    check_kind("model", model, nn.Module, "a module that was built: verify(Net(), autopar.Mesh(dp=2), ...)")
    check_kind("mesh", mesh, Mesh, "autopar.Mesh(dp=2, tp=2)")
    _check_layers(layers, codes, mesh)
    if program is not None and program.mesh != mesh:
        raise ValueError(
            f"the program is for {program.mesh}, not for {mesh}\nWay out: verify(model, program.mesh, ...)."
        )
    if program is not None and reduced:
        raise ValueError("a program that is handed in is proved at its own sizes\nWay out: leave out reduced=.")
    args, kwargs = _call(example_inputs)
    plan = plan or (program.plan if program is not None else Plan())
    made, smaller = (program, None) if program is not None else _compiled(model, mesh, plan, args, kwargs)
    every = (made,) if smaller is None else (made, smaller)
    found: list[Shown] = []
    if Layer.STRUCTURE in layers:
        found.append(_together([structure(one, codes) for one in every]))
    if Layer.RELATIONS in layers:
        found.append(_together(list(map(_relations, every))))
    run, sizes = _Subject(model, made, program is not None, args, kwargs, smaller), ""
    small = _reduced(reduced, run, mesh, plan, example_inputs) if {Layer.FIELD, Layer.FLOAT64} & set(layers) else None
    if small is not None:
        run, sizes = _small(small, plan, made), f"{small.words or 'a reduced model'}, {small.mesh}"
        found.append(_alike(made, run.program, _single(small, plan)))
    broken = any(refusal.where == CONTRACT for shown in found for refusal in shown.refusals)
    for layer, shown_by in ((Layer.FIELD, _in_a_field), (Layer.FLOAT64, _in_float64)):
        if layer in layers:
            words = "it cannot be executed: it breaks a contract of the compiler"
            found.append(Shown(layer, unproved=(words,)) if broken else shown_by(run))
    return Verification(made, tuple(found), sizes)


def _together(shown: Sequence[Shown]) -> Shown:
    """What one layer says of the program of a microbatch and of that of smaller ones, which have the same facts."""
    refusals = tuple(refusal for one in shown for refusal in one.refusals)
    unproved = tuple(words for one in shown for words in one.unproved)
    return Shown(shown[0].layer, shown[0].facts, refusals, unproved, sum(one.seconds for one in shown))


def _check_layers(layers: Collection[str], codes: Mapping[int, str] | None, mesh: Mesh) -> None:
    unknown = [name for name in layers if name not in LAYERS]
    if unknown or not layers:
        problem = f"layer {unknown[0]!r} is unknown" if unknown else "layers=(): nothing would be proved"
        raise ValueError(f"{problem}\nWay out: some of {', '.join(LAYERS)}.")
    if codes and Layer.STRUCTURE not in layers:
        raise ValueError("codes= are looked at by the layer structure alone\nWay out: add it to layers=.")
    if codes and mesh.is_pipelined:
        raise ValueError(f"codes= of ranks of {mesh}: on a pipeline they cannot be given\nWay out: program=.")


def _compiled(
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


@dataclass(frozen=True)
class _Subject:
    """What the layers that compute run. ``is_given``: the program was handed in. ``smaller``: see _compiled."""

    model: nn.Module
    program: AnyProgram
    is_given: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    smaller: AnyProgram | None = None


def _call(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def _reduced(
    asked: Reduced | bool | None,
    run: _Subject,
    mesh: Mesh,
    plan: Plan,
    example_inputs: Mapping[str, Any] | Sequence[Any],
) -> Reduced | None:
    if isinstance(asked, Reduced):
        return asked
    if asked is False or run.is_given or (asked is None and is_runnable(run.model)):
        return None
    found = reduced_of(run.model, mesh, plan, example_inputs)
    if found is None and asked:
        raise ValueError(
            f"{type(run.model).__name__} cannot be built with smaller sizes: its config has none that are known\n"
            "Way out: reduced=Reduced(small_model, small_mesh, small_inputs), of autopar.proof.reduced."
        )
    return found


def _small(reduced: Reduced, plan: Plan, program: AnyProgram) -> _Subject:
    """The reduced model and its program, which decides as ``program``; of many microbatches a few, stages cut anew."""
    args, kwargs = _call(reduced.example_inputs)
    few = min(plan.microbatches, 2 * reduced.mesh.size(PIPELINE))
    plan = replace(plan, check_numerics=False, microbatches=few, cuts=())
    traced = split_program(reduced.model, reduced.mesh, plan, args, kwargs, after="trace")
    assert isinstance(traced, Program)
    like = decided_alike(program, traced)
    small, smaller = _compiled(reduced.model, reduced.mesh, plan, args, kwargs, like)
    return _Subject(reduced.model, small, False, args, kwargs, smaller)


def _single(reduced: Reduced, plan: Plan) -> AnyProgram:
    """The program of the reduced model on one rank: of the first microbatch."""
    plan = Plan(check_numerics=False, precision=plan.precision, batch_dims=plan.batch_dims)
    args, kwargs = _call(reduced.example_inputs)
    return compile_program(reduced.model, Mesh(), plan, args, kwargs)


def _alike(program: AnyProgram, small: AnyProgram, single: AnyProgram) -> Shown:
    """Whether the reduced program stands for the other: its lines, and the numbers in them."""
    start = time.perf_counter()
    found = likeness(program.graph, small.graph)
    unproved: tuple[str, ...] = ()
    if found.difference:
        unproved = (f"the reduced program is another one: {found.difference}",)
    facts = {} if unproved else {"lines that are those of the reduced program": found.lines}
    facts |= {"times a block is repeated there": found.repeats} if found.repeats and not unproved else {}
    compared = compare_numbers(program, small, single)
    unproved += tuple(compared.unproved)
    if not (compared.refusals or compared.unproved):
        facts["numbers that are those of the reduced program, or grow as sizes do"] = compared.count
    return Shown(Layer.RELATIONS, facts, tuple(compared.refusals), unproved, time.perf_counter() - start)


def prove(model: nn.Module, program: AnyProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """For ``Plan(verify=True)``: raise ProofError for a compiled program that is refused; all layers but ``float64``.

    What could not be proved, as of a model that is too large to be executed here, is a warning.
    """
    layers = [structure(program), _relations(program)]
    if is_runnable(model):
        layers.append(_in_a_field(_Subject(model, program, False, tuple(args), kwargs)))
    found = Verification(program, tuple(layers))
    found.raise_if_refused()
    for words in found.unproved:
        warn(f"Plan(verify=True): not all of the program is proved: {words}")
    if not is_runnable(model):
        warn(
            f"Plan(verify=True): {_elements(model):,} parameters are too many to be executed exactly here: order, "
            "messages, memory and relations are proved, the values are not\n"
            "Way out: autopar verify MODEL --mesh ... executes the same model with smaller sizes."
        )


def _relations(program: AnyProgram) -> Shown:
    start = time.perf_counter()
    found = relations(program)
    seconds = time.perf_counter() - start
    return Shown(Layer.RELATIONS, found.facts, tuple(found.refusals), seconds=seconds)


def _elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def is_runnable(model: nn.Module) -> bool:
    """Whether the layers that compute run this model here in seconds."""
    return _elements(model) <= MOST_ELEMENTS


def _too_large(layer: Layer, model: nn.Module) -> Shown | None:
    """What is said of a model that is too large to be run here by this layer."""
    if is_runnable(model):
        return None
    words = f"{_elements(model):,} parameters are more than the {MOST_ELEMENTS:,} that are run here in seconds; "
    return Shown(layer, unproved=(words + "give the same model with smaller sizes, reduced=Reduced(...)",))


# ---------------------------------------------------------------- the layers that compute


def _in_a_field(run: _Subject) -> Shown:
    model, program, args, kwargs = run.model, run.program, run.args, run.kwargs
    if (large := _too_large(Layer.FIELD, model)) is not None:
        return large
    start = time.perf_counter()
    by_name = run.is_given and program.in_spec != pytree.tree_structure((args, dict(kwargs)))
    if by_name:
        args, kwargs = (), batch_by_name(model, args, kwargs)
    try:
        program, kwargs = called_by_name(model, program, kwargs) if by_name else (program, kwargs)
        stands = not run.is_given and not program.mesh.is_pipelined and program.plan.microbatches == 1
        source = program.source if stands else _traced(model, program.plan, args, kwargs)
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        given: dict[str, Any] = {"tensors": tensors, "args": args, "kwargs": kwargs, "smaller": run.smaller}
        proof = prove_in_field(program, source=source, **given)
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


def _refused_or_raised(layer: Layer, run: _Subject, problem: Exception, start: float) -> Shown:
    """The refusal of a program that was handed in, and that does not even take what the model takes."""
    if not run.is_given:
        raise problem
    words = f"it takes, or gives, other things than the model: {type(problem).__name__}: {problem}"
    cause = "it is of another model, batch or plan than this"
    refusal = Refusal(layer, "the program", words.removesuffix(": ").splitlines()[0], cause)
    return Shown(layer, {}, (refusal,), seconds=time.perf_counter() - start)


def _traced(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The model as it is traced now, in the plan's precision: no program that was handed in says what it computes."""
    return trace(model, args, kwargs, plan=replace(plan, check_numerics=False))


def _in_float64(run: _Subject) -> Shown:
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
    wrong, right = _errors(report)
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


def _errors(report: Report) -> tuple[tuple[Refusal, ...], int]:
    """The numbers that are wrong, largest error first, and how many are right."""
    errors = {} if report.loss is None else {"the loss": report.loss}
    errors |= {f"output {name}": error for name, error in report.outputs.items()}
    errors |= {f"the gradient of '{name}'": error for name, error in report.grads.items()}
    wrong = sorted(((error, name) for name, error in errors.items() if not error <= TOLERANCE), reverse=True)
    problem = "its error is {:.1e}, {:g} is allowed"
    found = [Refusal(Layer.FLOAT64, name, problem.format(error, TOLERANCE)) for error, name in wrong]
    return tuple(found), len(errors) - len(wrong)
