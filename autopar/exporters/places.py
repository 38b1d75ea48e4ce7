"""Where the values of a source are once its program is split: their layouts, and the ranks that have them.

A pass that changes a node gives it another name or another operator. So a node of the source and one of the split graph
are the same value where they have the same name, operator, type and line of the model. What passes have rewritten has
no place here; nor have the rows of experts, which a model sorts and passes bring back into the order of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autopar.ir import collectives as comm
from autopar.ir.layout import Layout
from autopar.ir.node import Node, origin, value, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE, Mesh
from autopar.operators.experts import EXPERT_LINEAR

REDUCING = comm.targets(("all_reduce", "reduce_scatter"))


@dataclass(frozen=True)
class Place:
    """``layout`` on ``mesh``; ``stage`` of a pipeline, whose ranks are those with ``pp=position``."""

    layout: Layout
    mesh: Mesh
    stage: int | None = None
    position: int | None = None

    def ranks(self) -> Iterator[int]:
        """Those that have a part of the value."""
        for rank in range(self.mesh.world_size):
            if self.position is None or self.mesh.coordinates(rank)[PIPELINE] == self.position:
                yield rank


def weight_places(program: AnyProgram) -> dict[str, Place]:
    """Of parameters and buffers, by each of their names. Those that several stages take have no place."""
    found: dict[str, Place] = {}
    stages = _stages(program, lambda stage: {entry.target for entry in stage.inputs})
    for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        if (place := _place(program, value(node).layout, stages.get(entry.target, []))) is not None:
            found |= dict.fromkeys(entry.names, place)
    return found


def activation_places(program: AnyProgram, source: Program) -> dict[Node, Place]:
    """Of inputs and of what the nodes of ``source`` compute, as far as they are known and no sum is pending."""
    split = {node.name: node for node in program.graph.nodes}
    own = {entry.target: node for node, entry in program.placeholders(InputKind.INPUT)}
    same = {node: own[entry.target] for node, entry in source.placeholders(InputKind.INPUT) if entry.target in own}
    sorted_rows = {
        value(node).shape[0] for graph in (source.graph, program.graph) for node in graph.nodes if _sorts(node)
    }
    for node in source.graph.nodes:
        if _is_same(node, split.get(node.name)) and not sorted_rows.intersection(value(node).shape[:1]):
            same[node] = split[node.name]
    stages = _stages(program, _computed)
    found = {}
    for node, other in same.items():
        settled = _settled(other)
        layout = value(settled).layout
        if not layout.partial and (place := _place(program, layout, stages.get(settled.name, []))) is not None:
            found[node] = place
    return found


def _computed(stage: Program) -> set[str]:
    """The names of what a stage computes and of the inputs that it takes."""
    inputs = {entry.node for entry in stage.inputs if entry.kind is InputKind.INPUT}
    return inputs | {node.name for node in stage.graph.nodes if node.op == "call_function"}


def _sorts(node: Node) -> bool:
    return node.target is EXPERT_LINEAR


def _is_same(node: Node, other: Node | None) -> bool:
    if other is None or node.op != "call_function" or other.target is not node.target:
        return False
    kinds = values(node), values(other)
    if not len(kinds[0]) == len(kinds[1]) == 1 or origin(node) != origin(other):
        return False
    return kinds[0][0].shape == kinds[1][0].shape and kinds[0][0].dtype == kinds[1][0].dtype


def _settled(node: Node) -> Node:
    """The sum of what ``node`` has parts of; ``node`` where it has none, or where no other node sums them."""
    while value(node).layout.partial:
        users = [user for user in node.users if user.target in REDUCING]
        if len(users) != len(node.users) or len(users) != 1:
            return node
        node = users[0]
    return node


def _stages(program: AnyProgram, names: Callable[[Program], set[str]]) -> dict[str, list[int]]:
    """Name -> the stages of a pipeline that have it."""
    found: dict[str, list[int]] = {}
    for number, stage in enumerate(program.stages if isinstance(program, PipelinedProgram) else ()):
        for name in names(stage):
            found.setdefault(name, []).append(number)
    return found


def _place(program: AnyProgram, layout: Layout, stages: list[int]) -> Place | None:
    if not isinstance(program, PipelinedProgram):
        return Place(layout, program.mesh)
    if len(stages) != 1:
        return None
    return Place(layout, program.mesh, stages[0], program.required_schedule.placement[stages[0]])
