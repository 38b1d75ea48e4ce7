"""Programs that are the same calls under other names, as the middle stages of a pipeline are: one is recorded.

stage 1: h = aten.linear(received, w1)      stage 2: h2 = aten.linear(received2, w2)

The joint graph of the second is that of the first with the names and origins of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from autopar.autodiff.partition import Joint
from autopar.autodiff.recorder import Names
from autopar.ir.arguments import flat_arguments
from autopar.ir.fast_graph import created
from autopar.ir.node import Node, Origin, origin, set_origin, set_values, values
from autopar.ir.program import Program

Partners = dict[Node, Node]


@dataclass(frozen=True)
class Recorded:
    """What autograd made of a program. ``asked``: the outputs that were to get a gradient, None for the usual ones."""

    program: Program
    asked: tuple[int, ...] | None
    joint: Joint
    differentiable: tuple[int, ...]
    gradients: tuple[str, ...]


def made_like(known: Recorded, program: Program, asked: tuple[int, ...] | None) -> Recorded | None:
    """What recording ``program`` would give, from what it gave for a program that is alike; None if it is not."""
    if known.asked != asked:
        return None
    partners = _partners(known.program, program)
    origins = _origins(partners) if partners is not None else None
    if partners is None or origins is None:
        return None
    targets = {entry.node: entry.target for entry in program.inputs}
    named = {entry.target: entry.node for entry in known.program.inputs}
    names = {node.name: other.name for node, other in partners.items()}
    gradients = tuple(targets[names[named[target]]] for target in known.gradients)
    return Recorded(program, asked, _renamed(known, program, names, origins), known.differentiable, gradients)


def _partners(known: Program, program: Program) -> Partners | None:
    """Node of the one -> node of the other in its place; None where they differ in more than names."""
    if known.mesh != program.mesh or known.loss != program.loss or len(known.graph.nodes) != len(program.graph.nodes):
        return None
    if [entry.kind for entry in known.outputs] != [entry.kind for entry in program.outputs]:
        return None
    kinds = [{entry.node: entry.kind for entry in one.inputs} for one in (known, program)]
    partners: Partners = {}

    def same(mine: Any, its: Any) -> bool:
        if isinstance(mine, Node) and isinstance(its, Node):
            return partners.get(mine) is its
        return type(mine) is type(its) and repr(mine) == repr(its)

    for one, other in zip(known.graph.nodes, program.graph.nodes):
        if one.op != other.op or values(one) != values(other):
            return None
        if one.op == "placeholder" and kinds[0][one.name] is not kinds[1][other.name]:
            return None
        if one.op == "call_function" and one.target is not other.target:
            return None
        (mine, shape), (its, other_shape) = flat_arguments(one), flat_arguments(other)
        if one.op != "placeholder" and (shape != other_shape or not all(map(same, mine, its))):
            return None
        partners[one] = other
    return partners


def _origins(partners: Partners) -> dict[Origin, Origin] | None:
    """The places in the model; None where one stands for several."""
    found: dict[Origin, Origin] = {}
    for one, other in partners.items():
        if found.setdefault(origin(one), origin(other)) != origin(other):
            return None
    return found


def _renamed(known: Recorded, program: Program, names: dict[str, str], origins: dict[Origin, Origin]) -> Joint:
    joint, graph, copies = known.joint, fx.Graph(), dict[Node, Node]()
    numbered = Names(node.name for node in program.graph.nodes)
    of_tangents = dict(zip(joint.tangents, (joint.outputs[position] for position in known.differentiable)))
    forward: set[Node] = set()
    for node in joint.graph.nodes:
        if node.op == "output":
            continue
        if node in of_tangents:
            name = f"grad_{copies[of_tangents[node]].name}"
        else:
            name = names.get(node.name) or numbered.name(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        target = name if node.op == "placeholder" else node.target
        copies[node] = created(graph, node.op, target, args, kwargs, name)
        set_values(copies[node], *values(node))
        set_origin(copies[node], origins.get(origin(node), origin(node)))
        if node in joint.forward:
            forward.add(copies[node])
    graph.output(())
    return Joint(
        graph,
        tuple(copies[node] for node in joint.inputs),
        tuple(copies[node] for node in joint.tangents),
        tuple(copies[node] for node in joint.outputs),
        tuple(copies[node] for node in joint.gradients),
        frozenset(forward),
    )
