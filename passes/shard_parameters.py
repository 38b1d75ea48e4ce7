"""Split parameters, and with them their gradients and optimizer states, over the data-like axes: ZeRO.

before, on mesh(dp=2), Plan(zero=3):
  p     = param w               : f32[8,4]
  x     = input                 : f32[8@dp,4]
  enter = comm.enter(p, dp)     : f32[8,4]
  y     = aten.linear(x, enter) : f32[8@dp,8]
  return y
after:
  p          = param w                       : f32[8@dp,4]
  x          = input                         : f32[8@dp,4]
  all_gather = comm.all_gather(p, dp, dim=0) : f32[8,4]
  y          = aten.linear(x, all_gather)    : f32[8@dp,8]
  return y

The dual of the gather is a reduce-scatter of the gradient, in place of an all-reduce. ``Plan.zero`` also determines
when the whole parameters are available: from before use to after it (stage 3), or all the time (1 and 2).

Several axes count as one of as many ranks: on ``mesh(dp=2 sp=2)`` each rank has a fourth, ``f32[8@dp+sp,4]``. A use
that has not entered all of them takes the gathered parameter by ``release``, whose dual counts a gradient that is alike
on some ranks once. Where no use has entered any, nothing is reduced, and the parameter is gathered for all ranks alike.
(Rajbhandari et al. 2020, ZeRO, section 5; the dims are cut as torch's ``fully_shard`` cuts them, one by one.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import no_parameter_is_gathered
from autopar.ir.layout import Factor, Split
from autopar.ir.node import Value, set_values, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.ir.traffic import bytes_of
from autopar.mesh import Mesh, axes_of
from autopar.notes import warn

ENTER, RELEASE = comm.OPS.enter.default, comm.OPS.release.default
LARGE = 0.01  # of the bytes of all parameters: a smaller one may stay whole without a warning


@graph_pass(
    requires=(no_parameter_is_gathered,),
    when=lambda program: bool(program.plan.zero) and program.mesh.shard_axis() is not None,
)
def shard_parameters(program: Program) -> Program:
    total = sum(bytes_of(value(node)) for node, _ in program.placeholders(InputKind.PARAMETER))
    for node, entry in program.placeholders(InputKind.PARAMETER):
        axis = program.mesh.shard_axis(taken=value(node).layout.axes)
        if axis is None or not node.users:
            continue
        dim = shard_dim(value(node), axis, program.mesh)
        if dim is not None:
            _shard(program, node, axis, dim)
        elif bytes_of(value(node)) >= LARGE * total:
            _warn(program, entry.target, value(node), axis, bytes_of(value(node)) / total)
    program.graph.eliminate_dead_code()  # once: it walks through the whole graph
    return program


def _warn(program: Program, name: str, kind: Value, axis: str, share: float) -> None:
    ways = program.mesh.size(axis)
    others = [other for other in program.mesh.names if other in kind.layout.axes]
    also = f", Plan(tensor={{'{name}': 'replicate'}}) to keep {', '.join(others)} off it" if others else ""
    warn(
        f"Plan(zero={program.plan.zero}) leaves '{name}' {kind.layout}, {share:.1%} of all parameter bytes, "
        f"whole on {axis}={ways}: no dim of it divides by {ways}, and none that no other axis splits is that long\n"
        f"Way out: fewer ranks on {axis}{also}, or a parameter with a dim of at least {ways} elements.",
        stacklevel=2,
    )


def shard_dim(kind: Value, axis: str, mesh: Mesh) -> int | None:
    """The dim to split: the first that divides, preferably one that no other axis splits; else the longest, unevenly.

    None for a parameter that would leave most ranks with nothing.
    """
    sizes, ways = kind.layout.local_shape(mesh), mesh.size(axis)
    free = [dim for dim, factors in enumerate(kind.layout.dims) if not any(factor.axes for factor in factors)]
    simple = [dim for dim, factors in enumerate(kind.layout.dims) if _is_evenly_cut(factors, mesh)]
    for dim in (*free, *simple):
        if sizes[dim] and sizes[dim] % ways == 0:
            return dim
    longest = max(free, key=lambda dim: sizes[dim], default=None)
    return longest if longest is not None and sizes[longest] >= ways else None


def _is_evenly_cut(factors: tuple[Factor, ...], mesh: Mesh) -> bool:
    """Whether the ranks of other axes have parts of one size each, contiguous ones."""
    (factor, *others) = factors
    return not others and factor.ratio == (1,) and factor.size % math.prod(map(mesh.size, factor.axes)) == 0


def _shard(program: Program, node: fx.Node, axis: str, dim: int) -> None:
    mesh, whole = program.mesh, value(node)
    uses = list(_uses(node, frozenset()))
    set_values(node, replace(whole, layout=whole.layout.place(axis, Split(dim), mesh)))
    where = comm.where(Split(dim), axis, mesh.size(axis), whole.layout.local_shape(mesh)[dim])
    op = Builder(before=next(iter(node.users)))
    axes = frozenset(axes_of(axis))
    entered = frozenset[str]().union(*(entered for _, _, entered in uses))
    if entered.isdisjoint(axes):  # all that is computed from it is alike on all ranks
        full = op(comm.OPS.all_gather_invariant.default, node, *where, like=whole)
        node.replace_all_uses_with(full, delete_user_cb=lambda user: user is not full)
        return
    source = node
    for other in sorted(entered - axes):  # reduced last, when the gradient is only a part
        source = op(ENTER, source, other, like=node)
    made = {axes | entered: op(comm.OPS.all_gather.default, source, *where, like=whole)}
    full = made[axes | entered]
    for user, held, known in uses:
        if known not in made:  # its gradient, alike on the ranks of other axes, counts once
            made[known] = op(RELEASE, full, mesh.merged((axes | entered) - known), like=whole)
        user.replace_input_with(held, made[known])


def _uses(node: fx.Node, axes: frozenset[str]) -> Iterator[tuple[fx.Node, fx.Node, frozenset[str]]]:
    """(user, the node that it takes, the axes that this node has entered) for every user of a parameter."""
    for user in node.users:
        if user.target is ENTER:
            yield from _uses(user, axes | comm.axes_over(user))
        else:
            yield user, node, axes
