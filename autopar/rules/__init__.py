"""The rule table: operator -> how it may be split. One line for most operators, a named function for the irregular.

``rule_for(target)`` finds a rule; ``register_rule`` adds one for a user's own operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from autopar.comm import OPS
from autopar.mesh import Mesh
from autopar.program import values
from autopar.rules import (
    bags,
    collectives,
    contractions,
    indexing,
    linear_algebra,
    losses,
    pointwise,
    random,
    recurrent,
    reductions,
    segments,
    spatial,
    views,
)
from autopar.rules.factoring import Call, Factoring, Part, Strategy, factoring_of
from autopar.rules.lines import read_rule
from autopar.rules.schemas import check_fits, operator_named, refuse_aliases

__all__ = ["Call", "Factoring", "Part", "Rule", "Strategy", "RULES", "call_of", "register_rule", "rule_for"]

Rule = Callable[[Call], Factoring]


def _from_line(line: str) -> Rule:
    return lambda call: factoring_of(line, call)


def _read(table: dict[Any, Any]) -> dict[Any, Rule]:
    return {target: _from_line(rule) if isinstance(rule, str) else rule for target, rule in table.items()}


RULES: dict[Any, Rule] = {
    **_read(pointwise.RULES),
    **_read(views.RULES),
    **_read(segments.RULES),
    **_read(contractions.RULES),
    **_read(bags.RULES),
    **_read(linear_algebra.RULES),
    **_read(spatial.RULES),
    **_read(recurrent.RULES),
    **_read(reductions.RULES),
    **_read(indexing.RULES),
    **_read(losses.RULES),
    **_read(random.RULES),
    **_read(collectives.RULES),
}


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator; operators that torch tags as pointwise need no line of their own."""
    if target in RULES:
        return RULES[target]
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    if torch.Tag.pointwise in tags and torch.Tag.data_dependent_output not in tags:  # aten.equal gives a bool
        return pointwise.broadcast
    return None


def register_rule(operator: str | Any, rule: str | Rule, check: Sequence[tuple[Any, ...]] = ()) -> None:
    """Teach autopar how ``operator`` (``"mylib::op"``, an OpOverload or a ``torch.library.custom_op``) may be split.

    ``rule`` is a line such as ``"b h s d, b h t d -> b h s t"`` or a function ``Call -> Factoring``; docs/rules.md
    explains both. A rule that the operator has already is replaced.

    ``check``: examples of arguments, tuples; a dict at the end of one holds keyword arguments. For each, the operator
    is run whole and on the pieces of every factor over 2 and 3 ranks, forward and (if it is differentiable) backward.
    Sizes have to divide by 2 or 3, float64 finds most; nothing is registered if the numbers differ.

    Raises ValueError for an operator that torch does not know or that writes into its arguments, for a line that cannot
    be read or does not fit it, and for a factor that no example can split; WrongRuleError if the numbers differ.
    """
    target = operator_named(operator)
    if target not in RULES:
        refuse_aliases(target)
    if isinstance(rule, str):
        check_fits(read_rule(rule), target)
    found = _from_line(rule) if isinstance(rule, str) else rule
    if check:
        from autopar.rule_check import check_examples  # stands above the rules

        check_examples(target, found, check)
    RULES[target] = found


def call_of(node: fx.Node, mesh: Mesh, parameters: frozenset[fx.Node] = frozenset()) -> Call:
    """The call that ``node`` makes, with the sizes that its operands have on one rank of the mesh so far."""
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    types = [values(operand)[0] for operand in operands]
    return Call(
        node.target,
        node.args,
        node.kwargs,
        tuple(operands),
        tuple(t.layout.local_shape(mesh) for t in types),
        tuple(t.layout.local_shape(mesh) for t in values(node)),
        tuple(t.requires_grad for t in types),
        tuple(_is_parameter(operand, parameters) for operand in operands),
    )


_KEEPS_ZEROS = {
    torch.ops.aten._to_copy.default, torch.ops.aten.transpose.int, torch.ops.aten.t.default,
    torch.ops.aten.permute.default, torch.ops.aten.clone.default, OPS.enter.default,
}  # fmt: skip


def _is_parameter(node: fx.Node, parameters: frozenset[fx.Node]) -> bool:
    """Whether ``node`` is a parameter, or a cast or transposition of one: the zeros of its padding are still zeros."""
    while node.op == "call_function" and node.target in _KEEPS_ZEROS:
        (node,) = node.all_input_nodes
    return node.op == "placeholder" and node in parameters
