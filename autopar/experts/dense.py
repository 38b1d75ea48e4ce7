"""Experts that compute all tokens, where the result takes only what the chosen ones give: the same for chosen pairs.

The sum over experts of what is 0 for an expert that the token did not choose is the sum over its choices. So a layer
that multiplies every token with every expert, and the results with weights that are mostly 0 (or the tokens, where an
expert maps 0 to 0), needs only the pairs that were chosen: rows in the order of the tokens, as many for each token as
it has choices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from autopar.experts.choices import Chosen, choices_of
from autopar.experts.digits import EXPERT, Located, Unaligned, size_of
from autopar.experts.picked import Picker
from autopar.experts.tracked import Tracked, off, tracked
from autopar.experts.unrolled import roll, unroll_the_rest
from autopar.ir.evaluate import known_constants
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import substitute
from autopar.ir.tables import InputKind

aten = torch.ops.aten

FORM = "every expert for every token"


@dataclass(frozen=True)
class Outcome:
    """What became of one sum over experts: the products made for it, or the reason why it stays."""

    chosen: Chosen
    products: tuple[fx.Node, ...] = ()
    reason: str = ""
    place: fx.Node | None = None  # what the reason is about


def make_sparse(program: Program) -> list[Outcome]:
    """Rewrite every sum over experts that only the chosen ones add to, and say what became of each."""
    choices = choices_of(program)
    rolled = roll(program.graph, {chosen.width for chosen in choices}) if choices else []
    parameters = frozenset(node for node, _ in program.placeholders(InputKind.PARAMETER))
    constants = known_constants(program)
    results: list[Outcome] = []
    for chosen in choices:
        found = tracked(program, constants, chosen)
        for node, located in found.ends.items():
            result = _rewritten(found, node, located, parameters)
            if result is not None:
                results.append(result)
        results += [Outcome(chosen, reason=reason, place=node) for node, reason in found.lost.items()]
    unroll_the_rest(program.graph, rolled)
    return results


def _rewritten(found: Tracked, node: fx.Node, located: Located, parameters: frozenset[fx.Node]) -> Outcome | None:
    """None for a sum of no experts, such as one of routing weights."""
    experts = next(size_of(itertools.chain(*mark.places), EXPERT) for mark in found.marks.values())
    try:
        if size_of(located.gone, EXPERT) != experts:
            raise Unaligned("it sums over some of the experts")
        picker = Picker(found, experts, node)
        places = located.result()
        rows = picker.reduced(node, located, places)
    except Unaligned as error:
        return Outcome(found.chosen, reason=error.reason, place=error.node or node)
    products = [product for product, weight in picker.products if _is_made_of(weight, parameters)]
    if not products:
        return None
    if node.target is aten.mean.dim:
        return Outcome(found.chosen, reason="it takes the mean of the experts", place=node)
    if off(found, node, located) != 0:
        return Outcome(
            found.chosen, reason="what an expert gives for a token that did not choose it is not 0", place=node
        )
    new = picker.rows.summed(picker.rows.pairs(rows), places, value(node).shape)
    substitute(node, new)
    return Outcome(found.chosen, tuple(products))


def _is_made_of(weight: fx.Node, parameters: frozenset[fx.Node]) -> bool:
    sources = {node for node in ancestors([weight]) if node.op == "placeholder"}
    return bool(sources) and sources <= parameters
