"""Rule lines for one dim of a tensor in place of all dims: ``at_dim("dim", "gone -> ; whole gone")``.

Each side of such a line gives the factors at that dim; nothing, where a tensor lacks the dim. ``... inside`` gives the
factors after all other dims. The other dims are the same in all tensors, and are split freely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autopar.rules.factoring import Call, Factoring, factoring_by
from autopar.rules.lines import Term, read_rule


def at_dim(argument: str, line: str, linear: bool = False) -> Callable[[Call], Factoring]:
    """The rule that ``line`` states at the dim which the operator's argument ``name`` gives.

    All operands have the left side, all outputs the right side. ``linear``: all operands may be pending sums together.
    """
    return lambda call: _factoring(line, linear, call, _number(call, argument))


def at_end(line: str, linear: bool = False) -> Callable[[Call], Factoring]:
    """The rule that ``line`` states for the last dims."""
    return lambda call: _factoring(line, linear, call, None)


def _number(call: Call, name: str) -> int:
    """The dim that the argument gives; it may be negative."""
    arguments = call.target._schema.arguments
    position = [argument.name for argument in arguments].index(name)
    return int(call.argument(position, name, arguments[position].default_value))


def _factoring(line: str, linear: bool, call: Call, dim: int | None) -> Factoring:
    rule = read_rule(line)
    (left,), (right,) = rule.inputs or ([],), rule.outputs
    here, behind = _sides(left)
    count = len(call.inputs[0]) - len(here) - len(behind)
    at = count if dim is None else dim % (count + 1)
    others = [[f"d{place if place < at else place + len(here)}"] for place in range(count)]

    def whole_tensor(term: Term) -> Term:
        here, behind = _sides(term)
        return [*others[:at], *here, *others[at:], *behind]

    inputs = (whole_tensor(left),) * len(call.inputs)
    outputs = (whole_tensor(right),) * len(call.outputs)
    together = (frozenset(range(len(inputs))),) if linear else ()
    return factoring_by(replace(rule, inputs=inputs, outputs=outputs, linear=together), call)


def _sides(term: Term) -> tuple[Term, Term]:
    """The factors at the dim, and the factors after all others."""
    middle = term.index(["..."]) if ["..."] in term else len(term)
    return term[:middle], term[middle + 1 :]
