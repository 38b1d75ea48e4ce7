"""The backward pass of a pipeline stage in steps that a schedule can put in different places.

    backward (*saved, *tangents) -> gradients
    -->
    B       (*saved, *tangents) -> (*gradients of received values, *partial)
    I       (*saved, *tangents) -> (*gradients of received values, *kept)        W   (*kept) -> partial
    reduce  (*partial) -> gradients of parameters, once a step, when ``partial`` is the sum over all microbatches

``partial`` is reduced over the data axes. I and W are the two halves of B: W computes products for which only gradients
of parameters wait, and has time until the end of the step. (Qi et al. 2023, Zero Bubble Pipeline Parallelism, which
calls I "B".)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from autopar.autodiff.hoist import ARRANGING, without_reductions
from autopar.autodiff.partition import extract
from autopar.ir.node import Node, output_node
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import InputKind
from autopar.mesh import REPLICA_AXES


@dataclass(frozen=True)
class BackwardSteps:
    """The graphs of the steps.

    ``at_once``: targets of the gradients that B and I return first. ``later``: parameters, in the order in which
    ``reduce`` returns their gradients.
    """

    whole: fx.Graph
    inputs: fx.Graph
    weights: fx.Graph
    reduce: fx.Graph
    at_once: tuple[str, ...]
    later: tuple[str, ...]


def backward_steps(stage: Program) -> BackwardSteps | None:
    """The backward pass of a differentiated stage in steps; None without one.

    The data axes reduce once a step, except for sharded gradients, which are never whole (``Plan(zero=2)``).
    """
    role = stage.required_role
    if role.backward is None:
        return None
    parameters = {entry.target for _, entry in stage.placeholders(InputKind.PARAMETER)}
    axes = REPLICA_AXES if stage.plan.zero < 2 else ()
    now = frozenset(position for position, target in enumerate(role.grads) if target not in parameters)
    cut = without_reductions(role.backward, axes, now)
    inputs, weights = halves(cut.rest, len(now))
    at_once = tuple(target for position, target in enumerate(role.grads) if position in now)
    later = tuple(target for position, target in enumerate(role.grads) if position not in now)
    return BackwardSteps(cut.rest, inputs, weights, cut.graph, at_once, later)


def halves(graph: fx.Graph, at_once: int) -> tuple[fx.Graph, fx.Graph]:
    """``graph`` as (inputs) -> (the first ``at_once`` results, *kept) and (kept) -> the other results."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    results: tuple[Node, ...] = output_node(graph).args[0]  # type: ignore[assignment]
    now, later = results[:at_once], results[at_once:]
    early = ancestors([*now, *(source for node in later for source in _factors(node))])
    needed = ancestors(later)
    late = [node for node in graph.nodes if node in needed and node not in early and node.op != "placeholder"]
    sources = [*(source for node in late for source in node.all_input_nodes), *later]
    kept = list(dict.fromkeys(node for node in sources if node in early or node.op == "placeholder"))
    return extract(graph, given, [*now, *kept]), extract(graph, kept, later)


def _factors(gradient: Node) -> list[Node]:
    """The factors of the products whose sum is ``gradient``; one of several results of an operator counts as it is."""
    found, wanted = list[Node](), [gradient]
    while wanted:
        node = wanted.pop()
        arranges = len(node.all_input_nodes) == 1 and (is_view(node.target) or node.target in ARRANGING)
        if arranges or node.target is torch.ops.aten.add.Tensor:
            wanted += node.all_input_nodes
        else:
            found += [node] if node.target is operator.getitem else node.all_input_nodes
    return found
