"""The graphs of a program that a rank runs: those of its role, with the work that a step does once cut out.

They are all made when the program is bound to a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.autodiff.halves import BackwardSteps
from autopar.autodiff.hoist import Gathering, Reducing, without_gathers, without_reductions
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import REPLICA_AXES

FORWARD, INFERENCE, BACKWARD = "forward", "inference", "backward"
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
    gathered: Mapping[str, Gathering] = field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Graph:
        return self.usual[name] if name in self.usual else self.rare[name]


def model_graphs(program: Program) -> RankGraphs:
    """The graphs of a model without a pipeline.

    The two parts of its backward pass, if any, are for ``no_sync`` only.
    """
    role, reducing = program.required_role, _deferred(program)
    gathered = _gathered(program)
    usual = role.graphs | {name: gathering.rest for name, gathering in gathered.items()}
    rare = {} if reducing is None else {PARTIAL: reducing.rest, REDUCED: reducing.graph}
    return RankGraphs(usual, rare, gathered)


def stage_graphs(program: Program, steps: BackwardSteps | None) -> RankGraphs:
    """The graphs of a pipeline stage with the backward ``steps``; schedules and ``loss.backward()`` choose one."""
    role, gathered = program.required_role, _gathered(program)
    usual = {FORWARD: role.forward, INFERENCE: role.inference}
    usual |= {name: gathering.rest for name, gathering in gathered.items()}
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
