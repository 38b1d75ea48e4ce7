"""Obstacles to splitting a weight: heads that the axis does not divide, a rule that needs the whole, a small size.

A policy lets such a weight stay whole; a refusal names the obstacle to the user.
"""

from __future__ import annotations

import math

from torch import fx

from autopar.ir.layout import Split
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.stacked_parameters import is_stacked, member_names
from autopar.split.flow import Flow

SMALL = 0.01  # a weight with less than this share of all parameter elements may stay whole without an error


def parameter_names(program: Program, weight: fx.Node) -> list[str]:
    """The model's names for the parameters from which ``weight`` is computed."""
    names: list[str] = []
    queue = [weight]
    while queue:
        node = queue.pop()
        if node.op == "placeholder":
            entry = program.input_of(node)
            names += [entry.target, *entry.aliases]
            names += member_names(entry.target, value(node).shape[0]) if is_stacked(entry.target) else ()
        queue += node.all_input_nodes
    return names


def is_small(flow: Flow, weight: fx.Node) -> bool:
    """Whether keeping ``weight`` whole costs almost no memory."""
    return math.prod(value(weight).shape) < SMALL * flow.parameter_elements


def is_used_whole(flow: Flow, call: fx.Node, weight: fx.Node) -> bool:
    """Whether the rule allows no split of this weight, whatever its sizes (a recurrent layer)."""
    factoring = flow.factorings[call]
    dims = factoring.inputs[flow.calls[call].operands.index(weight)]
    return all(factor in factoring.whole for dim in dims for factor in dim)


def has_fewer_heads_than_ranks(flow: Flow, call: fx.Node) -> bool:
    """Whether the results are heads, and fewer than there are ranks: several ranks then need the same head."""
    found = blocked(flow, call)
    return found is not None and found[1] < flow.ways and flow.ways % found[1] == 0


def blocked(flow: Flow, call: fx.Node) -> tuple[fx.Node, int] | None:
    """The consumer that cannot carry a split of the results of ``call``, and its number of parts (heads)."""
    for index, dims in enumerate(flow.factorings[call].outputs):
        for dim in range(len(dims)):
            if found := flow.blocked_by((call, index), Split(dim)):
                return found
    return None
