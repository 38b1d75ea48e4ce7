"""The graphs of a program that a rank runs: those of its role, with the work that a step does once cut out.

They are all made when the program is bound to a module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.autodiff.halves import BackwardSteps
from autopar.autodiff.hoist import Gathering, Gathers, Reducing, without_gathers, without_reductions
from autopar.ir import collectives as comm
from autopar.ir.node import output_node
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import REPLICA_AXES

FORWARD, INFERENCE, BACKWARD = "forward", "inference", "backward"
LEARN = "forward_for_loss"  # the forward pass of a training step: of the outputs for users, the loss alone
PARTIAL, REDUCED = "partial", "reduced"  # the backward pass of a model in two parts
WHOLE, INPUTS, WEIGHTS, REDUCE = "backward_whole", "backward_inputs", "backward_weights", "reduce_gradients"


@dataclass(frozen=True)
class RankGraphs:
    """Graphs by name.

    Attributes:
        usual: graphs whose Python is compiled when the program is bound: one that cannot be written as Python
            fails before the first step.
        rare: graphs that few runs need; their Python is compiled at first use.
        gathered: for a usual graph that takes whole, resident parameters, how these are gathered.
    """

    usual: Mapping[str, fx.Graph]
    rare: Mapping[str, fx.Graph] = field(default_factory=dict)
    gathered: Mapping[str, Gathers] = field(default_factory=dict)

    @property
    def learning(self) -> str:
        """The forward pass of a training step."""
        return LEARN if LEARN in self.usual else FORWARD

    def __getitem__(self, name: str) -> fx.Graph:
        return self.usual[name] if name in self.usual else self.rare[name]


def model_graphs(program: Program) -> RankGraphs:
    """The graphs of a model without a pipeline.

    The two parts of its backward pass, if any, are for ``no_sync`` only.
    """
    role, reducing = program.required_role, _deferred(program)
    gathered = _gathered(program)
    usual = role.graphs | {name: gathering.rest for name, gathering in gathered.items()}
    usual |= _learning(program, usual[FORWARD], program.loss)
    rare = {} if reducing is None else {PARTIAL: reducing.rest, REDUCED: reducing.graph}
    return RankGraphs(usual, rare, gathered)


def stage_graphs(program: Program, steps: BackwardSteps | None, loss: int | None) -> RankGraphs:
    """The graphs of a pipeline stage with the backward ``steps``; schedules and ``loss.backward()`` choose one.

    ``loss``: the position of the loss of the whole model among the stage's outputs, if it makes it.
    """
    role, gathered = program.required_role, _gathered(program)
    usual = {FORWARD: role.forward, INFERENCE: role.inference}
    usual |= {name: gathering.rest for name, gathering in gathered.items()}
    usual |= _learning(program, usual[FORWARD], loss)
    if steps is not None:
        usual |= {WHOLE: steps.whole, INPUTS: steps.inputs, WEIGHTS: steps.weights, REDUCE: steps.reduce}
    return RankGraphs(usual, gathered=gathered)


def _gathered(program: Program) -> dict[str, Gathering]:
    """Forward passes, with and without gradients, that take the parameters whole: those stay (``Plan(zero=1)``)."""
    if program.plan.zero not in (1, 2):
        return {}
    parameters = {entry.node for _, entry in program.placeholders(InputKind.PARAMETER)}
    role = program.required_role
    found = {name: without_gathers(role.graphs[name], parameters) for name in (FORWARD, INFERENCE)}
    return {name: gathering for name, gathering in found.items() if gathering is not None}


def _learning(program: Program, forward: fx.Graph, loss: int | None) -> dict[str, fx.Graph]:
    """The forward pass without what only the user's other outputs need: logits in another order, or gathered.

    In their places it returns a value that is there anyway. Empty where nothing is saved by that.
    """
    kept = [entry.kind is not OutputKind.USER or place == loss for place, entry in enumerate(program.outputs)]
    if program.required_role.backward is None or all(kept) or not any(kept):
        return {}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(forward, copies)  # with what is known of each node
    found: list[fx.Node] = [copies[node] for node in output_node(forward).args[0]]  # type: ignore[union-attr, index]
    there = found[kept.index(True)]
    graph.output(tuple(node if place >= len(kept) or kept[place] else there for place, node in enumerate(found)))
    remove_unused(graph)
    return {LEARN: graph} if len(graph.nodes) < len(forward.nodes) else {}


def _deferred(program: Program) -> Reducing | None:
    """The backward pass in two parts; None where nothing can be deferred.

    That is: without a data axis, with gradients of inputs, or with sharded gradients, where a rank has no room for
    whole ones (``Plan(zero=2)``).
    """
    role = program.required_role
    parameters = {entry.target for _, entry in program.placeholders(InputKind.PARAMETER)}
    axes = [axis for axis in REPLICA_AXES if program.mesh.size(axis) > 1]
    if role.backward is None or program.plan.zero > 1 or not axes or not parameters.issuperset(role.grads):
        return None
    return without_reductions(role.backward, axes)


def passed_on(graph: fx.Graph) -> list[int]:
    """The positions of results of ``graph`` that are inputs, or views of inputs."""
    returned: tuple[fx.Node, ...] = output_node(graph).args[0]  # type: ignore[assignment]
    return [position for position, node in enumerate(returned) if _base(node).op == "placeholder"]


def _base(node: fx.Node) -> fx.Node:
    """The node that allocated the memory of which ``node`` is a view."""
    while node.op == "call_function":
        passes_on = node.target in comm.TARGETS and comm.moving(node.target) is None
        if not (is_view(node.target) or node.target is operator.getitem or passes_on):
            break
        node = node.all_input_nodes[0]
    return node
