"""Contracts about the role of a differentiated program: its forward, backward and inference graphs.

See ``invariants.py`` for the others. For a program without a role, only the first two can fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.fast_graph import called, calls_of
from autopar.ir.invariants import broken, is_over_the_mesh
from autopar.ir.node import Node, output_node, values
from autopar.ir.operator_facts import writes
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh

Type = tuple[tuple[int, ...], torch.dtype]


def is_not_differentiated(program: AnyProgram) -> None:
    """There is no role yet: a pass that rewrites the program's own graph would not change the role."""
    parts = (program,) if isinstance(program, Program) else program.stages
    if any(part.role is not None for part in parts):
        raise InvariantError(
            "the program has forward and backward graphs already\nLikely fix: run this pass before differentiate, once"
        )


def is_differentiated(program: Program) -> None:
    """There is a role; ranks run its graphs."""
    if program.role is None:
        raise InvariantError("there is no role any more\nLikely fix: return the program with the role that it had")


def roles_are_complete(program: Program) -> None:
    """The results of the role's graphs match its tables, and its graphs take what the others return."""
    for name, graph, takes, gives in _signatures(program):
        nodes, results = _placeholders(graph), _results(graph)
        if len(nodes) != takes or len(results) != gives:
            raise InvariantError(
                f"the {name} graph takes {len(nodes)} and returns {len(results)} values; its role says "
                f"{takes} and {gives}\nLikely fix: change saved, differentiable and grads with the graphs"
            )


def _signatures(program: Program) -> Iterator[tuple[str, fx.Graph, int, int]]:
    """(name, graph, how many values it has to take, how many to return)"""
    role, inputs, outputs = program.role, len(program.inputs), len(program.outputs)
    if role is None:
        return
    yield "forward", role.forward, inputs, outputs + role.saved
    yield "inference", role.inference, inputs, outputs
    if role.backward is not None:
        yield "backward", role.backward, role.saved + len(role.differentiable), len(role.grads)


def roles_take_the_inputs(program: Program) -> None:
    """The forward and inference graphs take the program's inputs, in order, at the same local sizes and dtypes."""
    wanted = _placeholders(program.graph)
    for name, graph in _forward_graphs(program):
        _alike(_placeholders(graph), wanted, program.mesh, f"the {name} graph takes", "the program's input")


def roles_return_the_outputs(program: Program) -> None:
    """The forward and inference graphs return the program's outputs, in order, at the same local sizes and dtypes."""
    wanted = program.returned
    for name, graph in _forward_graphs(program):
        _alike(_results(graph), wanted, program.mesh, f"the {name} graph returns", "the program's output")


def _forward_graphs(program: Program) -> tuple[tuple[str, fx.Graph], ...]:
    role = program.role
    return (("forward", role.forward), ("inference", role.inference)) if role is not None else ()


def backward_takes_what_forward_saves(program: Program) -> None:
    """Each saved value, then each gradient, has the local sizes and dtype that it has in the forward graph."""
    role, count = program.role, len(program.outputs)
    if role is None or role.backward is None:
        return
    if any(position not in range(count) for position in role.differentiable):
        raise InvariantError(
            f"differentiable outputs {list(role.differentiable)} of {count}\n"
            "Likely fix: role.differentiable has positions among program.outputs"
        )
    results = _results(role.forward)
    wanted = [*results[count:], *(results[position] for position in role.differentiable)]
    _alike(_placeholders(role.backward), wanted, program.mesh, "backward takes", "what forward has saved as")


def _alike(found: Sequence[Node], wanted: Sequence[Node], mesh: Mesh, what: str, other: str) -> None:
    for node, like in zip(found, wanted):
        if isinstance(node, Node) and isinstance(like, Node) and _type(node, mesh) != _type(like, mesh):
            problem = f"{what} {_text(node, mesh)}, {other} {like.name} is {_text(like, mesh)}"
            raise broken(node, problem, "change both graphs together, in the same order")


def _type(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    return tuple([(kind.layout.local_shape(mesh), kind.dtype) for kind in values(node)])


def _text(node: Node, mesh: Mesh) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in _type(node, mesh))


def gradients_match_parameters(program: Program) -> None:
    """The gradient of a parameter has the parameter's local shape and is no pending reduction."""
    placed = {entry.target: node for node, entry in program.placeholders(InputKind.PARAMETER)}
    role = program.role
    if role is None or role.backward is None:
        return
    for target, node in zip(role.grads, _results(role.backward)):
        if target not in placed or not isinstance(node, Node):
            continue
        for grad, parameter in zip(values(node), values(placed[target])):
            if grad.layout.partial:
                fix = "the parameter must enter each axis on which it is used differently (comm.enter)"
                raise broken(node, f"the gradient of '{target}' is a pending sum: {grad.layout}", fix)
            sizes = grad.layout.local_shape(program.mesh), parameter.layout.local_shape(program.mesh)
            if sizes[0] != sizes[1]:
                fix = "the rule of the operator that uses the parameter, or a collective's dual, is wrong"
                raise broken(node, f"the gradient of '{target}' is {sizes[0]}, the parameter {sizes[1]}", fix)


def role_graphs_are_sound(program: Program) -> None:
    """In each graph of the role: only placeholders and functional calls, and every used value has its type.

    Each collective has a user and is over an axis of the mesh; each one that is started is waited for.
    """
    role = program.role
    for graph in (role.forward, role.backward, role.inference) if role is not None else ():
        if graph is None:
            continue
        for node in graph.nodes:
            if node.op not in ("call_function", "placeholder", "output"):
                raise broken(node, f"a {node.op} node ({node.target})", "write a function in its place")
            if not values(node) and node.users and node.op == "call_function":
                fix = "call set_values on every node that the pass creates"
                raise broken(node, f"{node.target} has no layout", fix)
        for node in calls_of(graph, [target for target in called(graph) if writes(target)]):
            raise broken(
                node, f"{node.target} writes into its argument", "leave writing in place to codegen/in_place.py"
            )
        for node in comm.collectives_of(graph):
            _check_collective(node, comm.TARGETS[node.target], program.mesh)


def _check_collective(node: Node, name: str, mesh: Mesh) -> None:
    if not node.users:
        raise broken(node, f"nothing uses the result of comm.{name}", "erase the node with the value it was for")
    is_over_the_mesh(node, name, mesh)
    if name in comm.STARTED and any(comm.TARGETS.get(user.target) != "wait" for user in node.users):
        user = next(user for user in node.users if comm.TARGETS.get(user.target) != "wait")
        raise broken(node, f"{user.name} uses comm.{name}, which nothing has waited for", "put comm.wait between them")


def collectives_resize_as_they_say(program: Program) -> None:
    """In each graph of the role, a collective's result has the local sizes that its operand and arguments give."""
    role = program.role
    for graph in role.graphs.values() if role is not None else ():
        for node in comm.collectives_of(graph):
            if node.all_input_nodes:
                _check_sizes(node, program.mesh)


def _check_sizes(node: Node, mesh: Mesh) -> None:
    ((shape, _),) = _type(node.all_input_nodes[0], mesh)

    def operand(item: Any) -> Any:
        if isinstance(item, Node):
            ((sizes, dtype),) = _type(item, mesh)
            return _Operand(sizes, dtype)
        return tuple(item) if isinstance(item, list) else item

    given = comm.arguments_of(node).values() if node.kwargs else node.args
    result = _result_sizes(node.target, tuple(map(operand, given)))
    if result != _type(node, mesh)[0][0]:
        problem = f"comm.{comm.TARGETS[node.target]} of {list(shape)} gives {list(result)}, not {_text(node, mesh)}"
        raise broken(node, problem, "give ways, dim and length that fit the operand, or the result its type")


class _Operand(NamedTuple):
    sizes: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(maxsize=4096)  # the layers of a model have the same collectives, and each is checked after each pass
def _result_sizes(target: Any, given: tuple[Any, ...]) -> tuple[int, ...]:
    """What the operator's shape function says of its local operands."""
    local = [
        torch.empty(item.sizes, dtype=item.dtype, device="meta") if isinstance(item, _Operand) else item
        for item in given
    ]
    return tuple(target(*local).shape)


def _placeholders(graph: fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _results(graph: fx.Graph) -> tuple[Node, ...]:
    results = output_node(graph).args[0]
    assert isinstance(results, (tuple, list))
    return tuple(results)
