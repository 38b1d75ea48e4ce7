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
from dataclasses import replace
from typing import Any

from torch import nn

from autopar.errors import check_kind
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.notes import warn
from autopar.plan import Plan
from autopar.proof.computing import OF_ANOTHER, in_a_field, in_float64
from autopar.proof.large import reduced_of, stands_for, subject_of
from autopar.proof.named_call import misfits
from autopar.proof.reduced import Reduced
from autopar.proof.refusal import Layer, Refusal, Shown
from autopar.proof.relations import relations
from autopar.proof.report import Verification
from autopar.proof.structure import CONTRACT, structure
from autopar.proof.subject import Subject, call_of, compiled, elements_of, is_runnable

LAYERS = tuple(Layer)


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
        codes: the code of single ranks as text, changed by hand: what :func:`autopar.proof.rank_texts.text_of` gives.
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
    args, kwargs = call_of(example_inputs)
    plan = plan or (program.plan if program is not None else Plan())
    made, smaller = (program, None) if program is not None else compiled(model, mesh, plan, args, kwargs)
    every = (made,) if smaller is None else (made, smaller)
    found: list[Shown] = []
    if Layer.STRUCTURE in layers:
        found.append(_together([structure(one, codes if one is made else None) for one in every]))
    if Layer.RELATIONS in layers:
        found.append(_together(list(map(_relations, every))))
    run, sizes = Subject(model, made, program is not None, args, kwargs, smaller), ""
    if program is not None and found:
        found[0] = _of_this_model(found[0], run)
    computes = bool({Layer.FIELD, Layer.FLOAT64} & set(layers))
    small = reduced_of(reduced, run, mesh, plan, example_inputs) if computes else None
    if small is not None:
        run, sizes = subject_of(small, plan, made), f"{small.words or 'a reduced model'}, {small.mesh}"
        found.append(stands_for(made, run.program, small, plan))
    broken = any(refusal.where == CONTRACT for shown in found for refusal in shown.refusals)
    for layer, shown_by in ((Layer.FIELD, in_a_field), (Layer.FLOAT64, in_float64)):
        if layer in layers:
            words = "it cannot be executed: it breaks a contract of the compiler"
            found.append(Shown(layer, unproved=(words,)) if broken else shown_by(run))
    return Verification(made, tuple(found), sizes)


def _together(shown: Sequence[Shown]) -> Shown:
    """What one layer says of the program of a microbatch and of that of smaller ones, which have the same facts."""
    refusals = tuple(refusal for one in shown for refusal in one.refusals)
    unproved = tuple(words for one in shown for words in one.unproved)
    return Shown(shown[0].layer, shown[0].facts, refusals, unproved, sum(one.seconds for one in shown))


def _of_this_model(shown: Shown, run: Subject) -> Shown:
    """``shown``, with a refusal where the program that was handed in is not even of this model and call."""
    words = list(misfits(run.model, run.program, run.args, run.kwargs))
    if not words:
        return shown
    more = f" (and {len(words) - 1} more)" if len(words) > 1 else ""
    refusal = Refusal(shown.layer, "the program", words[0] + more, OF_ANOTHER)
    return replace(shown, refusals=(refusal, *shown.refusals))


def _check_layers(layers: Collection[str], codes: Mapping[int, str] | None, mesh: Mesh) -> None:
    unknown = [name for name in layers if name not in LAYERS]
    if unknown or not layers:
        problem = f"layer {unknown[0]!r} is unknown" if unknown else "layers=(): nothing would be proved"
        raise ValueError(f"{problem}\nWay out: some of {', '.join(LAYERS)}.")
    if codes and Layer.STRUCTURE not in layers:
        raise ValueError("codes= are looked at by the layer structure alone\nWay out: add it to layers=.")
    strange = [rank for rank in codes or () if not 0 <= rank < mesh.world_size]
    if strange:
        raise ValueError(f"codes= of rank {strange[0]}: {mesh} has {mesh.world_size}\nWay out: ranks from 0 on.")


def prove(
    model: nn.Module, program: AnyProgram, args: Sequence[Any], kwargs: Mapping[str, Any], is_derived: bool = False
) -> None:
    """For ``Plan(verify=True)``: raise ProofError for a compiled program that is refused; all layers but ``float64``.

    ``is_derived``: it is of a family of sizes, and was not compiled: the model is traced anew for this call.
    What could not be proved, as of a model that is too large to be executed here, is a warning.
    """
    layers = [structure(program), _relations(program)]
    if is_runnable(model):
        layers.append(in_a_field(Subject(model, program, False, tuple(args), kwargs, is_derived=is_derived)))
    found = Verification(program, tuple(layers))
    found.raise_if_refused()
    for words in found.unproved:
        warn(f"Plan(verify=True): not all of the program is proved: {words}")
    if not is_runnable(model):
        warn(
            f"Plan(verify=True): {elements_of(model):,} parameters are too many to be executed exactly here: order, "
            "messages, memory and relations are proved, the values are not\n"
            "Way out: autopar verify MODEL --mesh ... executes the same model with smaller sizes."
        )


def _relations(program: AnyProgram) -> Shown:
    start = time.perf_counter()
    found = relations(program)
    seconds = time.perf_counter() - start
    return Shown(Layer.RELATIONS, found.facts, tuple(found.refusals), seconds=seconds)
