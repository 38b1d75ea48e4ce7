"""``autopar.compile_family``: one program for batches of many sizes, made without ranks and without a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autopar.cache.compiled import cached_program
from autopar.cache.kept_families import fitted
from autopar.cache.kept_questions import kept_questions
from autopar.cache.key import Request
from autopar.calls.call_sizes import general, shapes_of
from autopar.calls.calls import Call, Signature
from autopar.calls.size_families import SizeFamilies
from autopar.choices import check_choices
from autopar.errors import TraceError, check_kind
from autopar.families.family import Family
from autopar.frontend.fingerprint import call_facts
from autopar.ir.fingerprint import CallFacts
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.ir.size_conditions import Condition, Dims
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.runtime.written_code import written

Batch = Mapping[str, Any] | Sequence[Any]


def compile_family(model: nn.Module, mesh: Mesh, plan: Plan | None = None, batches: Sequence[Batch] = ()) -> Family:
    """The family of programs of ``model`` for all batches between the least and the greatest of ``batches``.

    ``batches``: at least two calls that differ in length, or three that differ in their rows, as arguments by name
    (dicts) or by position (tuples); shapes and dtypes count, values do not. Two more programs are compiled beside
    those of ``batches``, see docs/lengths.md.

    Raises TraceError, with the reason, where the programs of these batches are not one with other numbers; and what
    :func:`autopar.compile_program` raises.
    """
    check_kind("model", model, nn.Module, "a module that was built: compile_family(Net(), autopar.Mesh(dp=2), ...)")
    plan = plan or Plan()
    check_choices(mesh, plan)
    signature = Signature(model.forward)
    calls = [
        signature.call((), dict(batch)) if isinstance(batch, Mapping) else signature.call(tuple(batch), {})
        for batch in batches
    ]
    if len({shapes_of(call) for call in calls}) < 2 or len({general(call) for call in calls}) > 1:
        raise ValueError(
            "compile_family needs batches that differ in nothing but their sizes, two or more\n"
            "Way out: the shortest and the longest of a collator, [{'input_ids': ...}, {'input_ids': ...}]."
        )

    def compiled(call: Call, like: AnyProgram | None) -> tuple[AnyProgram, Guards]:
        return cached_program(Request(model, mesh, plan, call.args, call.kwargs, None, {}, like), written)

    def facts(call: Call) -> CallFacts:
        return call_facts(model, call.args, call.kwargs)

    def asked(call: Call, dims: Dims, sizes: Mapping[str, int]) -> list[Condition]:
        return kept_questions(Request(model, mesh, plan, call.args, call.kwargs), dims, sizes)

    known = SizeFamilies(compiled, facts, mesh, plan, asked, fitted)
    kind = general(calls[0])
    for call in calls:
        if known.member(kind, call) is None and known.grown(kind, call) is None:
            known.learn(kind, call, *compiled(call, known.like(kind)))
    for family in known.families:
        if all(known.member(kind, call) is not None for call in calls):
            return family
    raise TraceError(
        f"the programs for these batches are no family: {known.why_none or 'one of them is of another kind'}\n"
        "Way out: batches among which the model does the same (docs/lengths.md); or a program for each length."
    )
