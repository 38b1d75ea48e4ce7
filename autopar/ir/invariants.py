"""Contracts about programs. Each raises InvariantError with the node and the likely fix.

A contract is a function ``(program) -> None``. The levels of the compiler list them (``levels.py``), and passes may add
their own as ``requires`` and ``ensures`` (``graph_pass.py``). Each reads a graph at most once. The contracts of this
file are about the program's own graph; ``role_invariants.py`` has those about the differentiated graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import torch

from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.fast_graph import called, calls_of
from autopar.ir.layout import Layout
from autopar.ir.node import Node, origin, output_node, value, values
from autopar.ir.operator_facts import argument_names, is_overload, writes
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import REPLICA_AXES, Mesh, axes_of, overlap

Contract = Callable[[Program], None]

WHOLE, SPLIT, PARTIAL, MIXED = "whole", "split", "partial", "mixed"
STATES = {"I": WHOLE, "R": WHOLE, "S": SPLIT, "P": PARTIAL}
CHANGES = {  # collective -> the state of its operand and of its result on its axis
    name: (STATES[row.before], STATES[row.after])
    for name, row in comm.COLLECTIVES.items()
    if row.form is not comm.NOTE  # it is over axes that split the rows one by one
}

SIZES = ("size", "shape", "sizes", "input_sizes", "self_sizes")  # names of arguments with the sizes of a tensor


def broken(node: Node, problem: str, fix: str) -> InvariantError:
    """``linear_1 (model.layers.0.mlp; mlp.py:12: x @ w): problem``, and on the next line the way out."""
    where = origin(node)
    place = "; ".join(part for part in (where.module, where.source) if part)
    return InvariantError(f"{node.name}{f' ({place})' if place else ''}: {problem}\nLikely fix: {fix}")


def collectives(program: Program) -> Iterator[tuple[Node, str]]:
    """The collective nodes of the program's graph with their names."""
    for node in comm.collectives_of(program.graph):
        yield node, comm.TARGETS[node.target]


@lru_cache(maxsize=4096)  # the layers of a model have the same layouts, and each is checked after each pass
def state(layout: Layout, axis: str) -> str:
    """``whole``, ``split`` or ``partial``: the state of ``layout`` on ``axis``, which may be several merged to one.

    ``mixed`` where it is not the same on all of them, or where they split in several cuts.
    """
    wanted, pending = axis.split("+"), [axis for axis, _ in layout.partial]
    cuts = [[part for group in factor.axes for part in group.split("+")] for dim in layout.dims for factor in dim]
    found = {
        SPLIT if any(overlap(part, other) for cut in cuts for other in cut)
        else PARTIAL if any(overlap(part, other) for other in pending)
        else WHOLE
        for part in wanted
    }  # fmt: skip
    in_one = any(cut[start : start + len(wanted)] == wanted for cut in cuts for start in range(len(cut)))
    return found.pop() if len(found) == 1 and (len(wanted) == 1 or in_one or SPLIT not in found) else MIXED


# ---------------------------------------------------------------- the graph


def is_flat(program: Program) -> None:
    """Only placeholders and functions: no submodules, attributes or methods."""
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise broken(node, f"a {node.op} node ({node.target})", "inline it while canonicalising the traced graph")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise broken(node, f"{node.target} holds a graph of its own", "inline it while canonicalising the graph")


def is_functional(program: Program) -> None:
    """No operator writes into its arguments."""
    for node in calls_of(program.graph, [target for target in called(program.graph) if writes(target)]):
        raise broken(node, f"{node.target} writes into its argument", "functionalise in-place operators when tracing")


def placeholders_match_inputs(program: Program) -> None:
    """The placeholders are the inputs, in order, and no two have the same kind and target."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, entry in zip(nodes, program.inputs):
        if node.name != entry.node:
            raise broken(node, f"input {entry.node} stands here in program.inputs", "keep both in the same order")
    if len(nodes) != len(program.inputs):
        rest = nodes[len(program.inputs) :]
        what = f"placeholder {rest[0].name}" if rest else f"input {program.inputs[len(nodes)].node}"
        raise InvariantError(f"{what} has no counterpart\nLikely fix: change placeholders and program.inputs together")
    twice = [key for key, count in Counter((e.kind, e.target) for e in program.inputs).items() if count > 1]
    if twice:
        raise InvariantError(f"{twice[0][0].value} '{twice[0][1]}' is there twice\nLikely fix: merge the placeholders")


def constants_are_there(program: Program) -> None:
    """Every constant that the graph takes has its tensor in the program, of the node's shape and dtype."""
    for node, entry in program.placeholders(InputKind.CONSTANT):
        tensor = program.constants.get(entry.target)
        if tensor is None:
            raise broken(node, f"there is no constant '{entry.target}'", "add its tensor to program.constants")
        for kind in values(node):
            if tuple(tensor.shape) != kind.shape or tensor.dtype != kind.dtype:
                problem = f"constant '{entry.target}' is {tensor.dtype} {tuple(tensor.shape)}, the node says otherwise"
                raise broken(node, problem, "change program.constants and the node together")


def results_match_outputs(program: Program) -> None:
    """Every returned value is a node, and program.outputs has one entry for each."""
    end = output_node(program.graph)
    for position, node in enumerate(program.returned):
        if not isinstance(node, Node):
            raise broken(end, f"returned value {position} is {node!r}", "constants belong into program.static_outputs")
    if len(program.returned) != len(program.outputs):
        problem = f"{len(program.returned)} values are returned, program.outputs has {len(program.outputs)} entries"
        raise broken(end, problem, "change the output node and program.outputs together")


# ---------------------------------------------------------------- layouts


def every_value_has_a_layout(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "output" and node.users and not values(node):
            raise broken(node, f"{node.target} has no layout", "call set_values on every node that the pass creates")


def layouts_fit_the_mesh(program: Program) -> None:
    """Layouts name axes of the mesh, and each axis at most once."""
    names = frozenset(program.mesh.names)
    fine = set[int]()  # by their ids: most are shared, and to compare them takes longer than to look at them
    for node in program.graph.nodes:
        for kind in values(node):
            if id(kind.layout) in fine:
                continue
            groups = [*kind.layout.groups, *(axis for axis, _ in kind.layout.partial)]
            if len(names.intersection(groups)) == len(groups):
                fine.add(id(kind.layout))
                continue  # a fast path for correct layouts, which are nearly all
            for group in groups:
                fits_the_mesh(node, f"{kind.layout} speaks of", group, program.mesh)
            used = [part for group in groups for part in group.split("+")]
            for part in used:
                count = sum(overlap(part, other) for other in used)
                if count > 1:
                    fix = "take the value off the axis (Layout.without) before placing it again"
                    raise broken(node, f"{kind.layout} has axis '{part}' {count} times", fix)


def fits_the_mesh(node: Node, what: str, group: str, mesh: Mesh) -> None:
    """Raise InvariantError unless ``group`` names, in normal form, an axis of ``mesh`` or several."""
    if _is_normal(group, mesh):
        return
    missing = next((axis for axis in axes_of(group) if axis not in mesh.names), None)
    if missing is not None:
        raise broken(node, f"{what} axis '{missing}', {mesh} has none", "use axes of program.mesh")
    try:
        normal = mesh.merged([group])
    except ValueError as problem:
        raise broken(node, f"{what} '{group}': {problem}", "take the name from program.mesh.merged(axes)") from None
    if group != normal:
        written = f"{what} '{group}', which is '{normal}' on {mesh}"
        raise broken(node, written, "take the name from program.mesh.merged(axes)")


@lru_cache(maxsize=1024)
def _is_normal(group: str, mesh: Mesh) -> bool:
    try:
        return set(axes_of(group)) <= set(mesh.names) and group == mesh.merged([group])
    except ValueError:
        return False


def is_over_the_mesh(node: Node, name: str, mesh: Mesh) -> None:
    """Raise InvariantError unless a collective is over an axis of ``mesh``. A rank may note its load alone."""
    axis = comm.axis_of(node)
    if name != "tally" or mesh.size(axis) > 1:
        fits_the_mesh(node, f"comm.{name} is over", axis, mesh)


def no_partial_value_escapes(program: Program) -> None:
    """No output and no buffer update is a pending reduction. A value that a stage sends may be one."""
    for node, entry in zip(program.returned, program.outputs):
        for kind in values(node) if entry.kind is not OutputKind.SENT else ():
            for axis, op in kind.layout.partial:
                name = f"'{entry.target}'" if entry.target else "result"
                problem = f"{entry.kind.value} {name} is a pending {op} over axis '{axis}' ({kind.layout})"
                raise broken(node, problem, f"insert comm.all_reduce(..., {axis}) before it is returned")


def loss_is_invariant(program: Program) -> None:
    """Scalar outputs are whole on every axis: all ranks compute the same loss."""
    for node, entry in zip(program.returned, program.outputs):
        for kind in values(node):
            scalar = entry.kind is OutputKind.USER and not kind.shape
            pending = dict(kind.layout.partial)
            if scalar and pending:
                axis, op = next(iter(pending.items()))
                problem = f"the scalar output '{entry.target}' is still a {op} over axis '{axis}'"
                raise broken(node, problem, f"all-reduce it over {axis}: the loss is that of the whole batch")


def nothing_is_placed(program: Program) -> None:
    """No value is split or partial on any axis, and nothing is sent: the splitting passes are yet to come."""
    for node, name in collectives(program):
        fix = "leave collectives to the splitting passes, or run this pass before them"
        raise broken(node, f"comm.{name} before anything is split", fix)
    for node in program.graph.nodes:
        for kind in values(node):
            if kind.layout.groups or kind.layout.partial:
                fix = "leave placing values to the splitting passes, or run this pass before them"
                raise broken(node, f"{kind.layout} is placed on the mesh already", fix)


@cache
def _place_of_sizes(target: object) -> int | None:
    """The position of the argument of an operator that has the sizes of its result, or of what it is a gradient of."""
    names = argument_names(target) if is_overload(target) else ()
    return next((place for place, name in enumerate(names) if name in SIZES), None)


def ragged_sizes_are_free(program: Program) -> None:
    """No argument says the size of a ragged dim: it is that of a balanced load, and other on each rank at run time."""
    for graph in program.graphs.values():
        for node in calls_of(graph, [target for target in called(graph) if _place_of_sizes(target) is not None]):
            place = _place_of_sizes(node.target)
            if place is None or len(node.args) <= place or not any(kind.layout.ragged for kind in values(node)[:1]):
                continue
            sizes = node.args[place]
            for dim, factors in enumerate(values(node)[0].layout.dims):
                if any(factor.ragged for factor in factors) and isinstance(sizes, (list, tuple)) and sizes[dim] != -1:
                    problem = f"it says the size {sizes[dim]} of ragged dim {dim} of {values(node)[0].layout}"
                    raise broken(node, problem, "write -1 (autodiff/ragged.py), or an operator without the sizes")


def whole_on(axis: str) -> Contract:
    """The contract that no value is split or partial on ``axis`` yet, required by the pass that owns the axis."""

    def contract(program: Program) -> None:
        for node in program.graph.nodes:
            for kind in values(node):
                if state(kind.layout, axis) != WHOLE:
                    fix = f"run one pass for axis '{axis}', once"
                    raise broken(node, f"{kind.layout} is already placed on axis '{axis}'", fix)

    contract.__name__ = f"whole_on({axis})"
    return contract


def no_parameter_is_gathered(program: Program) -> None:
    """No parameter is gathered over a data-like axis: that is left to the pass that splits them over these (ZeRO).

    One may be split over such an axis already where ranks use their parts of it (experts over ``ep``).
    """
    for parameter, entry in program.placeholders(InputKind.PARAMETER):
        uses = [(parameter, user) for user in parameter.users]
        while uses:
            node, user = uses.pop()
            if user.target is comm.OPS.enter.default:
                uses += [(user, further) for further in user.users]
            elif user.target in comm.GATHERS and not comm.axes_over(user).isdisjoint(REPLICA_AXES):
                over = comm.arguments_of(user)["axis"]
                problem = f"parameter '{entry.target}' is {value(parameter).layout}, gathered over '{over}' already"
                raise broken(user, problem, f"split parameters over '{over}' in one pass, once")


# ---------------------------------------------------------------- collectives


def no_dead_collectives(program: Program) -> None:
    """Every collective has a user: one without would be dropped on some ranks and waited for on others."""
    for node, name in collectives(program):
        if not node.users:
            raise broken(node, f"nothing uses the result of comm.{name}", "erase the node with the value it was for")


def collectives_fit_the_mesh(program: Program) -> None:
    """Each collective is over an axis of the mesh, with that axis' number of ways."""
    for node, name in collectives(program):
        given = comm.arguments_of(node)
        axis = str(given["axis"])
        is_over_the_mesh(node, name, program.mesh)
        if given.get("ways", program.mesh.size(axis)) != program.mesh.size(axis):
            problem = f"comm.{name} is over {given['ways']} ranks, axis '{axis}' has {program.mesh.size(axis)}"
            raise broken(node, problem, "take the number of ways from program.mesh.size(axis)")


def collectives_match_layouts(program: Program) -> None:
    """A reduction reduces a partial value, a gather joins a split one, and so on."""
    for node, name in collectives(program):
        if name not in CHANGES:
            continue
        operand, axis = node.args[0], str(node.args[1])
        assert isinstance(operand, Node)
        for what, holder, expected in zip(("operand", "result"), (operand, node), CHANGES[name]):
            for kind in values(holder)[:1]:
                if state(kind.layout, axis) != expected:
                    problem = f"the {what} of comm.{name} is {kind.layout}; it should be {expected} on axis '{axis}'"
                    raise broken(node, problem, "give it the layout, or choose the collective, that fits")
