"""``autopar.register_rule``: a rule for a user's own operator, checked against it before it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.rules import Rule, add, from_line, has_own
from autopar.rules.lines import read_rule
from autopar.rules.schemas import check_fits, operator_named, refuse_aliases
from autopar.verification.rule_check import check_examples


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
    if not has_own(target):
        refuse_aliases(target)
    if isinstance(rule, str):
        check_fits(read_rule(rule), target)
    found = from_line(rule) if isinstance(rule, str) else rule
    if check:
        check_examples(target, found, check)
    add(target, found)
