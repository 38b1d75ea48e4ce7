"""What is said about the layers of experts of a program: which were recognised, which were not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from autopar.experts.choices import Chosen, choice_of, choices_of
from autopar.experts.dense import Outcome
from autopar.ir.node import origin, value
from autopar.ir.operator_facts import is_product
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.ir.tables import Decision, InputKind, Routed, Unrouted
from autopar.operators.experts import EXPERT_LINEAR

EXPERTS = "experts"  # of ``Program.decisions``
AS_TRACED = "rows of each expert"
UNKNOWN_FORM = "it is none of the forms that are known: grouped products, gathered weights, a sum over weighted experts"


def decisions_on_experts(
    program: Program, forms: Mapping[fx.Node, str], outcomes: Iterable[Outcome]
) -> dict[str, Decision]:
    """By node name. ``forms``: how each recognised product was written."""
    return {**_recognised(program, forms), **_left(program, list(outcomes))}


def _recognised(program: Program, forms: Mapping[fx.Node, str]) -> dict[str, Decision]:
    layers: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is EXPERT_LINEAR:
            layers.setdefault(operand(node, 2), []).append(node)
    choices = {chosen.ids: chosen for chosen in choices_of(program)} if layers else {}
    found: dict[str, Decision] = {}
    for ids, products in layers.items():
        chosen = choice_of(ids, choices)
        tokens = chosen.tokens if chosen else min(value(operand(product)).shape[0] for product in products)
        experts = value(operand(products[0], 1)).shape[0]
        written = ", ".join(dict.fromkeys(forms.get(product, AS_TRACED) for product in products))
        names = tuple(product.name for product in products)
        per_token = value(ids).shape[0] // max(tokens, 1)
        layer = Routed(written, {}, None, origin(products[0]).module, experts, per_token, names)
        found |= dict.fromkeys(names, layer)
    return found


def _left(program: Program, outcomes: list[Outcome]) -> dict[str, Decision]:
    """Products with stacked weights after a choice among as many: the last such choice before them."""
    choices = {chosen.ids: chosen for chosen in choices_of(program)}
    stacks = _stacks(program) if choices else {}
    found: dict[str, Decision] = {}
    before: list[Chosen] = []
    for node in program.graph.nodes:
        before += [choices[node]] if node in choices else []
        if node.target is EXPERT_LINEAR or not is_product(node.target):
            continue
        sizes = {size for source in node.all_input_nodes for size in stacks.get(source, ())}
        chosen = next((chosen for chosen in reversed(before) if chosen.width in sizes), None)
        if chosen is not None and chosen.ids.name not in found:
            found[chosen.ids.name] = _unrouted(node, chosen, outcomes)
    return found


def _stacks(program: Program) -> dict[fx.Node, set[int]]:
    """Parameters, and values computed from them alone: how many matrices the stacks among these have."""
    found: dict[fx.Node, set[int]] = {}
    for node, _ in program.placeholders(InputKind.PARAMETER):
        shape = value(node).shape
        found[node] = {shape[0]} if len(shape) > 2 else set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and all(source in found for source in sources):
            found[node] = set().union(*(found[source] for source in sources))
    return found


def _unrouted(product: fx.Node, chosen: Chosen, outcomes: list[Outcome]) -> Unrouted:
    said = [outcome for outcome in outcomes if outcome.chosen == chosen and outcome.reason]
    reason, place = next(((one.reason, one.place) for one in said), (UNKNOWN_FORM, None))
    source = origin(place or product).source
    others = {"the chosen ones": reason}
    return Unrouted("every expert runs for every token", others, None, origin(product).module, source, reason)
