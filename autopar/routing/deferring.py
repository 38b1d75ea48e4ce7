"""A gather behind the experts waits until there is less to gather: the weighted sum over the experts of a token.

gathered = comm.all_gather(rows, tp)             part  = comm.split(weights, tp)
mul      = aten.mul(gathered, weights)     -->   mul   = aten.mul(rows, part)
sum      = aten.sum(view(mul), [1])              sum   = aten.sum(view(mul), [1])
                                                 whole = comm.all_gather(sum, tp)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Split
from autopar.ir.node import Value, set_values, value, values
from autopar.ir.traffic import bytes_of
from autopar.mesh import Mesh
from autopar.rules import call_of, rule_for
from autopar.rules.factoring import Call, Factoring, Strategy


@dataclass(frozen=True)
class _Step:
    """A node that could work on a part of what is gathered, and so give a part."""

    node: fx.Node
    call: Call
    factoring: Factoring
    strategy: Strategy

    @property
    def split(self) -> Split:
        found = self.strategy.outputs[0]
        assert isinstance(found, Split)
        return found


def defer_gather(gather: fx.Node, mesh: Mesh) -> None:
    """Move a gather of dim 0 behind the operators that follow it alone, to where it has the fewest bytes."""
    given = comm.arguments_of(gather)
    axis, ways = str(given["axis"]), int(given["ways"])
    steps = _steps(gather, axis, ways, mesh)
    sizes = [bytes_of(value(node), mesh) for node in (gather, *(step.node for step in steps))]
    best = sizes.index(min(sizes))
    if not best:
        return
    cut = comm.OPS.split if gather.target is comm.OPS.all_gather_invariant.default else comm.OPS.split_replicated
    part, joined = gather.all_input_nodes[0], gather
    for step in steps[:best]:
        whole = value(step.node)
        _split_operands(step, joined, part, axis, ways, mesh, cut)
        set_values(step.node, _part_of(whole, step.split.dim, axis, mesh))
        part = joined = step.node
    last = steps[best - 1]
    length = whole.layout.local_shape(mesh)[last.split.dim]
    op = Builder(after=last.node)
    users = list(last.node.users)
    found = op(gather.target, last.node, *comm.where(last.split, axis, ways, length), like=whole)
    for user in users:
        user.replace_input_with(last.node, found)
    gather.graph.erase_node(gather)


def _steps(gather: fx.Node, axis: str, ways: int, mesh: Mesh) -> list[_Step]:
    found: list[_Step] = []
    node, split = gather, Split(0)
    while len(node.users) == 1:
        (user,) = node.users
        step = _step(user, node, split, ways, mesh)
        if step is None:
            break
        found.append(step)
        node, split = user, step.split
    return found


def _step(user: fx.Node, node: fx.Node, split: Split, ways: int, mesh: Mesh) -> _Step | None:
    rule = rule_for(user.target) if user.op == "call_function" and user.target not in comm.TARGETS else None
    if rule is None or len(values(user)) != 1:
        return None
    call = call_of(user, mesh)
    factoring = rule(call)
    position = call.operands.index(node)
    part = factoring.part_of(factoring.inputs[position], split, ways)
    strategy = factoring.strategy(part, ways) if part is not None else None
    if part is None or strategy is None or part.factor in factoring.rewrites or call.operands.count(node) > 1:
        return None
    result = strategy.outputs[0]
    plain = isinstance(result, Split) and result.contiguous
    others = [p for i, p in enumerate(strategy.inputs) if i != position and isinstance(p, Split)]
    even = all(p.contiguous for p in others)
    return _Step(user, call, factoring, strategy) if plain and even else None


def _split_operands(step: _Step, joined: fx.Node, part: fx.Node, axis: str, ways: int, mesh: Mesh, cut: Any) -> None:
    """Let the node of a step take parts."""
    parts = {joined: part}
    for source, placement in zip(step.call.operands, step.strategy.inputs):
        if isinstance(placement, Split) and source is not joined:
            kind = value(source)
            length = kind.layout.local_shape(mesh)[placement.dim]
            like = _part_of(kind, placement.dim, axis, mesh)
            op = Builder(before=step.node)
            parts[source] = op(cut.default, source, *comm.where(placement, axis, ways, length), like=like)
    args, kwargs = step.node.args, dict(step.node.kwargs)
    if step.factoring.localize is not None:
        whole = value(step.node).layout.local_shape(mesh)
        shape = tuple(size // ways if dim == step.split.dim else size for dim, size in enumerate(whole))
        args, kwargs = step.factoring.localize(step.call, step.strategy, (shape,), ways)
    step.node.args, step.node.kwargs = fx.map_arg((args, kwargs), lambda x: parts.get(x, x))  # type: ignore[assignment]


def _part_of(kind: Value, dim: int, axis: str, mesh: Mesh) -> Value:
    """The type of the part of a rank of ``axis``, of which ``kind`` is whole on that axis."""
    dims = list(kind.layout.dims)
    axes = (*(name for factor in dims[dim] for name in factor.axes), axis)
    local = kind.layout.local_shape(mesh)[dim] // mesh.size(axis)
    dims[dim] = (Factor(local * math.prod(map(mesh.size, axes)), axes),)
    return replace(kind, layout=replace(kind.layout, dims=tuple(dims)))
