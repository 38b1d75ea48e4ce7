"""The rule table: operator -> how it may be split, as one line where a line can say it, else as a named function.

Most of the functions serve many operators: ``broadcast``, ``reduction``, ``along_dims``.

``rule_for(target)`` finds a rule; ``autopar.register_rule`` adds one for a user's own operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir.collectives import IDENTITIES
from autopar.ir.node import values
from autopar.ir.operator_facts import is_pointwise
from autopar.mesh import Mesh
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

__all__ = [
    "Call",
    "Factoring",
    "Part",
    "Rule",
    "Strategy",
    "RULES",
    "add",
    "call_of",
    "from_line",
    "has_own",
    "rule_for",
]

Rule = Callable[[Call], Factoring]


def from_line(line: str) -> Rule:
    """The rule that a line such as ``"b m k, b k n -> b m n"`` states."""
    return lambda call: factoring_of(line, call)


def _read(table: dict[Any, Any]) -> dict[Any, Rule]:
    return {target: from_line(rule) if isinstance(rule, str) else rule for target, rule in table.items()}


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


def has_own(target: Any) -> bool:
    """Whether the table has an entry for the operator."""
    return target in RULES


ADDED: dict[Any, Rule] = {}  # those that users have entered


def add(target: Any, rule: Rule) -> None:
    """Enter a rule, in place of what the operator has. ``autopar.register_rule`` checks it first."""
    RULES[target] = ADDED[target] = rule


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator; operators that torch tags as pointwise need no line of their own."""
    if target in RULES:
        return RULES[target]
    return pointwise.broadcast if is_pointwise(target) else None


def call_of(node: fx.Node, mesh: Mesh, parameters: frozenset[fx.Node] = frozenset()) -> Call:
    """The call that ``node`` makes, with the sizes of its operands on one rank after the axes that are split so far."""
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
    torch.ops.aten.permute.default, torch.ops.aten.clone.default, *IDENTITIES,
}  # fmt: skip


def _is_parameter(node: fx.Node, parameters: frozenset[fx.Node]) -> bool:
    """Whether ``node`` is a parameter, or a cast or transposition of one, which keeps zeros in its padding."""
    while node.op == "call_function" and node.target in _KEEPS_ZEROS:
        (node,) = node.all_input_nodes
    return node.op == "placeholder" and node in parameters
