"""What a sequence axis does with one program: its sequence dims, the form of each attention, the order of the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from autopar.errors import NoSequenceError
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor
from autopar.ir.node import origin, value, values
from autopar.ir.program import Program
from autopar.ir.repeated_heads import unrepeated_heads
from autopar.ir.rewrite import operand, remove_unused
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.notes import warn
from autopar.rules import call_of
from autopar.split.attention_forms import Forms, attentions, size_of
from autopar.split.flow import Key
from autopar.split.seams import SEAMS, without_seams
from autopar.split.sequence_dims import check_divides, dims_of_attention, dims_of_inputs, written_out
from autopar.split.sequence_policy import SequencePolicy
from autopar.split.split_axis import spread_flow

aten = torch.ops.aten


def _no_sequence(program: Program, axis: str) -> str:
    inputs = ", ".join(
        f"{entry.target} {list(value(node).layout.shape)}" for node, entry in program.placeholders(InputKind.INPUT)
    )
    return (
        f"{axis}={program.mesh.size(axis)} splits a sequence, and this model shows none: it has no attention, and none "
        f"of its inputs has a dim of positions ({inputs or 'no inputs'})\n"
        "Way out: Plan(sequence_dims={'input': dim}) says which dim of an input it is; or use dp, tp or pp instead."
    )


def sequence_policy(program: Program, axis: str) -> SequencePolicy:
    """How ``axis`` splits the program.

    Raises IndivisibleError where the axis does not divide a sequence, NoSequenceError where there is none,
    SequenceError where an attention cannot run in the form that the plan asks for.
    """
    inputs = dims_of_inputs(program)
    dims = dims_of_attention(program) or inputs
    given = {node: dim for (node, _), dim in inputs} if program.plan.inputs == "local" else {}
    if not dims:
        raise NoSequenceError(_no_sequence(program, axis))
    check_divides(program, axis, (*dims, *(((node, 0), dim) for node, dim in given.items())))
    forms = Forms(program, axis, halves_divide(program, axis, dims))
    if not any(map(forms.is_uneven_in_order, attentions(program))):
        forms = replace(forms, mirrored=False)
    for node in attentions(program):
        forms.check(node)
    return SequencePolicy(axis, forms, dims, given)


def with_even_lengths(program: Program, axis: str) -> SequencePolicy:
    """Rewrite what shortens or lengthens a sequence (:mod:`autopar.split.seams`); how ``axis`` splits the result."""
    while True:
        policy = sequence_policy(program, axis)
        if not any(node.target in SEAMS for node in program.graph.nodes):
            return policy
        if not without_seams(program, spread_flow(program, policy), policy.split(0)):
            return policy


def warn_of_written_out(program: Program) -> None:
    """Say where an attention is written out by hand, so that the plan's form does not apply."""
    asked = program.plan.attention
    found = list(written_out(program))
    if found and asked not in ("auto", "gather"):
        where = origin(found[0]).module or found[0].name
        warn(
            f'Plan(attention="{asked}") does not apply to {len(found)} attentions that are written out as products and '
            f"a softmax, the first at {where}: each rank computes its rows of the scores, of gathered keys and values",
            stacklevel=2,
        )


def halves_divide(program: Program, axis: str, dims: Sequence[tuple[Key, int]]) -> bool:
    """Whether all sequences divide into two parts for each rank, so that they can be in zig-zag order."""
    parts = 2 * program.mesh.size(axis)
    lengths = (values(node)[index].layout.local_shape(program.mesh)[dim] for (node, index), dim in dims)
    return all(length % parts == 0 for length in lengths)


def with_own_heads(program: Program, axis: str) -> Program:
    """Let attention take the keys and values of the fewer heads that grouped-query attention repeats.

    Whatever moves them moves no copies then. Where heads are dealt out, they are repeated as often as the ranks need.
    """
    for node in attentions(program):
        fewer = unrepeated_heads(operand(node, 1), operand(node, 2), lambda x: value(x).shape)
        node.args = (node.args[0], *fewer, *node.args[3:])
        _repeat_for_ranks(program, node, axis)
        shapes = [value(operand(node, place)).shape for place in (0, 1)]
        if (
            len(shapes[0]) > 3
            and shapes[0][-3] != shapes[1][-3]
            and node.target is aten.scaled_dot_product_attention.default
        ):
            node.kwargs = {**node.kwargs, "enable_gqa": True}
    remove_unused(program.graph)
    return program


def _repeat_for_ranks(program: Program, node: fx.Node, axis: str) -> None:
    """Where heads are dealt out and there are fewer of keys than ranks, several ranks need the same: repeat those."""
    call = call_of(node, program.mesh)
    size, ways = size_of(call), program.mesh.size(axis) * program.mesh.size("tp")
    if Forms(program, axis, mirrored=False).form(call).kind != "ulysses" or size.key_heads % ways == 0:
        return
    repeats = math.lcm(size.key_heads, ways) // size.key_heads
    found = [_repeated(program.mesh, node, operand(node, place), repeats) for place in (1, 2)]
    node.args = (node.args[0], *found, *node.args[3:])


def _repeated(mesh: Mesh, node: fx.Node, source: fx.Node, repeats: int) -> fx.Node:
    """In front of ``node``, ``source`` (B, H, S, D) with each head ``repeats`` times, one after the other."""
    kind = value(source)
    batch, heads, length, width = kind.layout.dims
    sizes = [(batch, heads, (Factor(1),), length, width), (batch, heads, (Factor(repeats),), length, width)]
    merged = (batch, (*heads, Factor(repeats)), length, width)
    new, wide, joined = (replace(kind, layout=replace(kind.layout, dims=dims)) for dims in (*sizes, merged))
    local = [list(each.layout.local_shape(mesh)) for each in (wide, joined)]
    op = Builder(before=node)
    new_dim = op(aten.unsqueeze.default, source, 2, like=new)
    return op(aten.reshape.default, op(aten.expand.default, new_dim, local[0], like=wide), local[1], like=joined)
