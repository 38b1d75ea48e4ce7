"""Where a program has its sequence dims: at its attention operators, or at its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.batch import sequence_dims
from autopar.ir.node import origin, value, values
from autopar.ir.operator_facts import is_pointwise
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.operators import ATTENTIONS
from autopar.split.flow import Key, key_of, weights_of

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def dims_of_attention(program: Program) -> tuple[tuple[Key, int], ...]:
    """(value, dim) of the operands and the result of every attention, and of the scores of those written out."""
    found: dict[tuple[Key, int], None] = {}
    for node in program.graph.nodes:
        if node.target in ATTENTIONS:
            for tensor in (*node.args[:3], node):
                found[key_of(tensor), len(value(tensor).shape) - 2] = None
    for scores in written_out(program):
        last = len(value(scores).shape) - 1
        found |= {((scores, 0), last - 1): None, ((scores, 0), last): None}
    return tuple(found)


def written_out(program: Program) -> Iterator[fx.Node]:
    """The products of two activations that a softmax over the last dim follows: scores of an attention by hand."""
    weights = weights_of(program)
    for node in program.graph.nodes:
        if node.target not in SOFTMAX or int(node.args[1]) not in (-1, len(value(node).shape) - 1):
            continue
        source = node.args[0]
        while is_pointwise(source.target) and source.target not in PRODUCTS:
            source = max(source.all_input_nodes, key=lambda n: math.prod(value(n).shape))
        if (
            source.target in PRODUCTS
            and len(value(source).shape) > 2
            and not weights.intersection(source.all_input_nodes)
        ):
            yield source


def dims_of_inputs(program: Program) -> tuple[tuple[Key, int], ...]:
    """(value, dim) of the inputs that have a sequence: as the plan says, or by the usual guess."""
    inputs = list(program.placeholders(InputKind.INPUT))
    kinds = [(entry.target, value(node)) for node, entry in inputs]
    tensors = [(name, kind.layout.shape, kind.dtype.is_floating_point) for name, kind in kinds]
    dims = sequence_dims(tensors, program.plan.sequence_dims)
    return tuple(((node, 0), dim) for (node, _), dim in zip(inputs, dims) if dim is not None)


def check_divides(program: Program, axis: str, dims: tuple[tuple[Key, int], ...]) -> None:
    """Raise IndivisibleError for a sequence that the ranks of the axis do not divide."""
    ways = program.mesh.size(axis)
    for (node, index), dim in dims:
        length = values(node)[index].layout.local_shape(program.mesh)[dim]
        if length % ways:
            missing = -length % ways
            where = origin(node).module or node.name
            raise IndivisibleError(
                f"the sequence of {length} positions at {where} does not divide by {axis}={ways}\n"
                f"Way out: pad the inputs by {missing} to {length + missing} positions, masked and without labels "
                f"(autopar.pad_batch does that); or a size of {axis} that divides {length}."
            )
