"""The tensors of a model in this process, and the programs that it was given for them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from autopar.cache.kept_questions import kept_questions
from autopar.cache.key import Request
from autopar.calls.calls import Call
from autopar.calls.given_programs import GivenPrograms
from autopar.families.family import Family
from autopar.frontend.fingerprint import call_facts
from autopar.ir.fingerprint import CallFacts
from autopar.ir.program import AnyProgram
from autopar.ir.size_conditions import Condition, Dims
from autopar.mesh import Mesh
from autopar.observation.everything_read import everything_of
from autopar.plan import Plan
from autopar.weights.parameters import Weights


@dataclass
class Holding:
    """The tensors of a model in this process, beside those of its state dict.

    Attributes:
        model: the unmodified model.
        weights: its parameters and buffers, and how they are held.
        calls: the number of training calls so far; the seeds of dropout continue from there.
    """

    model: nn.Module
    weights: Weights
    calls: int = 0


def given_programs(held: Holding, programs: Sequence[AnyProgram | Family], where: str) -> GivenPrograms:
    """``programs`` for the calls of a model, which holds its tensors as they require from now on."""
    for program in programs:
        held.weights.lay_out(program.first_program if isinstance(program, Family) else program)

    def state() -> Hashable:
        modes = tuple([module.training == held.model.training for module in held.model.modules()])
        dtypes = tuple([parameter.dtype for parameter in held.weights.root.parameters()])
        return held.weights.requires_grad(), dtypes, modes

    return GivenPrograms(programs, where, partial(facts_of, held), state, partial(everything_of, held.model))


def facts_of(held: Holding, call: Call) -> CallFacts:
    """What a fingerprint says of a call of the model."""
    return call_facts(held.model, call.args, call.kwargs)


def asked_by(
    held: Holding, mesh: Mesh, plan: Plan, call: Call, dims: Dims, sizes: Mapping[str, int]
) -> list[Condition]:
    """What forward asks about ``sizes`` in a call, see :func:`autopar.frontend.size_questions.questions`."""
    with held.weights.given_back_on_failure(), held.weights.traceable():
        return kept_questions(Request(held.model, mesh, plan, call.args, call.kwargs), dims, sizes)
