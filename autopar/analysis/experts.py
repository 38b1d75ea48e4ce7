"""The layers of experts of a program: which were recognised, in which form they were written, and which were not."""

from __future__ import annotations

from autopar.ir.program import AnyProgram
from autopar.ir.tables import Routed, Unrouted

EXPERTS = "experts"  # of ``program.decisions``, as recognise_experts fills them


def routed_regions(program: AnyProgram) -> tuple[Routed, ...]:
    """The layers of experts whose rows are multiplied with the matrices of chosen experts alone, in order."""
    found: list[Routed] = []
    for decision in program.decisions.get(EXPERTS, {}).values():
        if isinstance(decision, Routed) and decision not in found:
            found.append(decision)
    return tuple(found)


def unrecognised(program: AnyProgram) -> tuple[Unrouted, ...]:
    """The layers in which tokens choose experts, and every expert runs for every token all the same."""
    decisions = program.decisions.get(EXPERTS, {}).values()
    return tuple(decision for decision in decisions if isinstance(decision, Unrouted))
