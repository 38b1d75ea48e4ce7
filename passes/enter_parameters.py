"""Let parameters enter an axis, not the views, casts and stacks of them, where no rank sends more by that.

before, on mesh(dp=2):
  w       = param w                  : f32[8,4]
  x       = input                    : f32[8@dp,8]
  t       = aten.t(w)                : f32[4,8]
  enter   = comm.enter(t, dp)        : f32[4,8]
  y       = aten.linear(x, enter)    : f32[8@dp,4]
  squares = aten.mul.Tensor(w, w)    : f32[8,4]
  return y, squares
after:
  w       = param w                         : f32[8,4]
  x       = input                           : f32[8@dp,8]
  enter_1 = comm.enter(w, dp)               : f32[8,4]
  release = comm.release(enter_1, dp)       : f32[8,4]
  t       = aten.t(enter_1)                 : f32[4,8]
  y       = aten.linear(x, t)               : f32[8@dp,4]
  squares = aten.mul.Tensor(release, release) : f32[8,4]
  return y, squares

The gradient of the parameters is linear in that of what is made of them alone: it may be summed over the ranks after
this step, not before it. One reduction then serves all uses of a parameter, merges with those over other axes, and is a
reduce-scatter with ZeRO. A use that is alike on all ranks takes the parameter by ``release``, whose dual counts its
gradient once.

A slice of a parameter is reduced with fewer bytes than the parameter, a stack of parameters with as many as these. So
bytes decide, for all parameters and values that depend on each other at once: a reduce-scatter sends half of an
all-reduce, and one more axis costs a parameter that enters others anyway little, or nothing with ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import value, values
from autopar.ir.operator_facts import is_pure
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import operand, substitute
from autopar.ir.tables import Decision, InputKind
from autopar.ir.traffic import bytes_of
from autopar.mesh import REPLICA_AXES, SHARD_AXES

ENTERED = "entered"  # decisions, by axis and parameters:
PARAMETERS, VALUES = "the parameters", "the values made of them"
ENTER, RELEASE = comm.OPS.enter.default, comm.OPS.release.default


@dataclass
class Group:
    """Values that enter an axis, by their ``enters``, with the parameters of which they are made: they move together.

    ``nodes``: these parameters, and the values on the way.
    """

    enters: list[fx.Node] = field(default_factory=list)
    parameters: set[fx.Node] = field(default_factory=set)
    nodes: set[fx.Node] = field(default_factory=set)

    def add(self, other: Group) -> None:
        self.enters += other.enters
        self.parameters |= other.parameters
        self.nodes |= other.nodes


@graph_pass(when=lambda program: program.mesh.of_stage.world_size > 1)
def enter_parameters(program: Program) -> Program:
    axes = [axis for axis, size in reversed(program.mesh.of_stage.axes) if size > 1]
    made: dict[str, Decision] = {}
    moved = len(axes)
    while moved:  # a parameter that enters one axis may then enter others at a lower price
        moved = sum(_move_enters(program, axis, made) for axis in axes)
    return replace(program, decisions={**program.decisions, ENTERED: made})


def _move_enters(program: Program, axis: str, made: dict[str, Decision]) -> int:
    """Move the enters over ``axis`` to the parameters where that pays; in how many groups it did."""
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    found = []
    for group in filter(_is_below, _groups(program, axis)):
        name = f"{axis} {' '.join(sorted(parameter.name for parameter in group.parameters))}"
        pinned = program.pins.choices.get(ENTERED, {}).get(name)
        pays = _pays(program, axis, group) if pinned is None else pinned == PARAMETERS
        made[name] = Decision(PARAMETERS if pays else VALUES)
        found += [group] * pays
    for group in found:
        _move(group, axis, order)
    return len(found)


def _groups(program: Program, axis: str) -> Iterable[Group]:
    alike = _made_of_weights(program, axis)
    trained = {node for node, _ in program.placeholders(InputKind.PARAMETER)}
    group_of: dict[fx.Node, Group] = {}
    for node in program.graph.nodes:
        if node.target is not ENTER or node.args[1] != axis or operand(node) not in alike:
            continue
        nodes = {source for source in ancestors([operand(node)]) if any(kind.requires_grad for kind in values(source))}
        group = Group([node], nodes & trained, nodes | set(_items(nodes)))
        for other in {id(group_of[one]): group_of[one] for one in group.parameters if one in group_of}.values():
            group.add(other)
        group_of |= dict.fromkeys(group.parameters, group)
    return {id(group): group for group in group_of.values()}.values()


def _made_of_weights(program: Program, axis: str) -> set[fx.Node]:
    """The values of parameters, buffers and constants alone: the same on all ranks of ``axis``, used alike by them."""
    found = {node for node, _ in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)}
    for node in program.graph.nodes:
        over = comm.axes_over(node) if node.target in comm.TARGETS else ()
        if node.op == "call_function" and is_pure(node.target) and axis not in over:
            found |= {node} if found.issuperset(node.all_input_nodes) else set()
    return found


def _items(nodes: Set[fx.Node]) -> Iterator[fx.Node]:
    """The results of those of ``nodes`` that have several: only they can be used."""
    for node in nodes:
        if node.op == "call_function" and len(values(node)) > 1:
            yield from node.users


def _is_below(group: Group) -> bool:
    """Whether something enters that is no parameter, though it may have entered other axes."""
    return any(_source(enter) not in group.parameters for enter in group.enters)


def _source(enter: fx.Node) -> fx.Node:
    """The value that enters, before it enters any axis."""
    node = operand(enter)
    while node.target is ENTER:
        node = operand(node)
    return node


def _pays(program: Program, axis: str, group: Group) -> bool:
    """Whether the parameters' gradients send no more than those of the values, in bytes that an all-reduce is of."""
    mesh, zero = program.mesh, bool(program.plan.zero)
    merged = SHARD_AXES if zero else REPLICA_AXES if axis in REPLICA_AXES else ()
    sent = 0.0
    for parameter in group.parameters:
        size = bytes_of(value(parameter), mesh)
        ways = math.prod(mesh.size(other) for other in _entered(parameter) & set(merged) - {axis})
        if not zero or axis not in SHARD_AXES:
            sent += size / ways
        elif ways == 1:
            sent += size / 2  # a reduce-scatter
    return sent <= sum(bytes_of(value(enter), mesh) for enter in group.enters)


def _entered(node: fx.Node) -> set[str]:
    """The axes that a parameter enters itself."""
    entering = [user for user in node.users if user.target is ENTER]
    return {axis for user in entering for axis in (*comm.axes_over(user), *_entered(user))}


def _move(group: Group, axis: str, order: Mapping[fx.Node, int]) -> None:
    """Let the parameters enter, and other users than those behind the group's enters take them by ``release``."""
    inside = group.nodes | set(group.enters)
    for parameter in sorted(group.parameters, key=order.__getitem__):
        users = sorted(parameter.users, key=order.__getitem__)
        entered = Builder(before=users[0])(ENTER, parameter, axis, like=parameter)
        for user in users:
            user.replace_input_with(parameter, entered)
        _release(entered, [user for user in users if user not in inside], axis)
    for node in sorted(group.nodes - group.parameters, key=order.__getitem__):
        if len(values(node)) == 1 and value(node).requires_grad:
            _release(node, [user for user in node.users if user not in inside], axis)
    for enter in group.enters:
        substitute(enter, operand(enter))


def _release(node: fx.Node, users: list[fx.Node], axis: str) -> None:
    if users:
        released = Builder(after=node)(RELEASE, node, axis, like=node)
        for user in users:
            user.replace_input_with(node, released)
