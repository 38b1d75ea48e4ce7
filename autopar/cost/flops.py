"""Floating-point operations of an operator, from shapes alone: a multiplication and an addition are two operations.

Products of matrices, convolutions and attention are counted as textbooks do: a causal mask halves nothing, but a window
or chunks leave few scores, and so does one tile of a ring. Operators that only move data count zero, any other operator
one operation for each floating element of its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import Value, values
from autopar.ir.operator_facts import is_operator, only_moves, packet_of
from autopar.operators import (
    TILE,
    TILE_BACKWARD,
    hybrid_attention,
    masked_attention,
    padded_convolution,
    ring_attention,
    rows_attention,
)
from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD
from autopar.operators.attention_blocks import tile_pairs
from autopar.operators.experts import EXPERT_LINEAR, EXPERT_OUTER
from autopar.operators.predicates import Chunk, Within, parse
from autopar.operators.recurrent import RECURRENT_LAYER

aten = torch.ops.aten

Shape = tuple[int, ...]
WHERE: dict[Any, int] = {rows_attention: 8, ring_attention: 9, hybrid_attention: 10}  # position of their formula
Count = Callable[[Sequence[Shape], Sequence[Shape], fx.Node], int]  # shapes of operands, shapes of outputs, the call


def flops(node: fx.Node, shape_of: Callable[[Value], Shape]) -> int:
    """Floating-point operations of a call, for the sizes that ``shape_of`` gives (of whole tensors or of one rank)."""
    if not is_operator(node) and node.target not in FORMULAS:
        return 0
    outputs = values(node)
    count = FORMULAS.get(packet_of(node) if is_operator(node) else node.target)
    if count is None and _only_moves(node):
        return 0
    if count is None:
        return sum(math.prod(shape_of(out)) for out in outputs if out.dtype.is_floating_point)
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    return count([shape_of(values(x)[0]) for x in operands], [shape_of(out) for out in outputs], node)


def _only_moves(node: fx.Node) -> bool:
    """Views, copies, constants and collectives."""
    return only_moves(node.target) or not node.all_input_nodes or node.target in comm.TARGETS


# ---------------------------------------------------------------- formulas


def _product(left: int) -> Count:
    """Two operations for each output and each element of the last dim of operand ``left``."""
    return lambda inputs, outputs, _: 2 * math.prod(outputs[0]) * inputs[left][-1]


def _convolution(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """Each output is a sum over the window and the input channels of its group."""
    return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])


def _transposed(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """Each input is spread over the window and the output channels of its group."""
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _either_convolution(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    return (_transposed if node.args[6] else _convolution)(inputs, outputs, node)


def _convolution_backward(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """The gradients of input and weight each cost as much as the convolution; only those that are required count."""
    mask, transposed = node.args[10], node.args[7]
    assert isinstance(mask, (list, tuple))
    outside = inputs[1] if transposed else inputs[0]
    return 2 * math.prod(outside) * math.prod(inputs[2][1:]) * sum(map(bool, mask[:2]))


def _attention(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """The scores, and the values weighted by them."""
    q, k, v = inputs[:3]
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """The scores again, then the gradients of weights, values, queries and keys."""
    q, k, v = inputs[1:4]
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


def _masked_attention(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """As :func:`_attention`, for the scores that windows and chunks leave."""
    q, k, v = inputs[:3]
    return 2 * math.prod(q[:-2]) * _most_pairs(q, k, (node.args[5], 0, 1, False)) * (q[-1] + v[-1])


def _tile(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    q, k, v = inputs[:3]
    return 2 * math.prod(q[:-2]) * _most_pairs(q, k, node.args[6:10]) * (q[-1] + v[-1])


def _tile_backward(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    q, k, v = inputs[1:4]
    return 2 * math.prod(q[:-2]) * _most_pairs(q, k, node.args[9:13]) * (3 * q[-1] + 2 * v[-1])


def _attention_of_part(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """As :func:`_masked_attention`, of the rows that are counted: all of the sequence, or an even share of it."""
    q, k, v = inputs[:3]
    queries, keys = (values(source)[0].shape[-2] for source in node.all_input_nodes[:2])
    where = str(node.args[WHERE[node.target]])
    pairs = tile_pairs(where, 0, 0, 1, False, queries, keys) * q[-2] // queries
    return 2 * math.prod(q[:-2]) * pairs * (q[-1] + v[-1])


def _most_pairs(q: Shape, k: Shape, tile: Sequence[Any]) -> int:
    """The scores of the slowest rank, for which the others wait; of a whole attention, those that a window leaves."""
    where, step, ways, mirrored = tile
    if ways == 1 and not any(isinstance(term, (Within, Chunk)) for term in parse(where).terms):
        return q[-2] * k[-2]
    lengths = q[-2] * ways, k[-2] * (ways if step >= 0 else 1)
    return max(tile_pairs(where, rank, step, ways, mirrored, *lengths) for rank in range(ways))


def _einsum(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """Two operations for each combination of all letters."""
    terms = str(node.args[0]).replace(" ", "").replace(".", "").partition("->")[0].split(",")
    sizes = {letter: size for term, shape in zip(terms, inputs) for letter, size in zip(term[::-1], shape[::-1])}
    return 2 * math.prod(sizes.values())


def _bilinear(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    return 2 * math.prod(outputs[0]) * inputs[0][-1] * inputs[1][-1]


def _recurrent(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """Each weight matrix once for each position of each row."""
    positions = math.prod(inputs[0][:2])
    return 2 * positions * sum(math.prod(shape) for shape in inputs[1:] if len(shape) == 2)


def _expert_outer(inputs: Sequence[Shape], outputs: Sequence[Shape], node: fx.Node) -> int:
    """One outer product for each choice of an expert."""
    left, right, ids = inputs
    return 2 * ids[0] * left[1] * right[1]


FORMULAS: dict[Any, Count] = {
    aten.linear: _product(0),
    aten.mm: _product(0),
    aten.bmm: _product(0),
    aten.matmul: _product(0),
    aten.mv: _product(0),
    aten.dot: _product(0),
    aten.addmm: _product(1),
    aten.addmv: _product(1),
    aten.baddbmm: _product(1),
    aten.bilinear: _bilinear,
    aten.einsum: _einsum,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _transposed,
    aten.conv_transpose2d: _transposed,
    aten.conv_transpose3d: _transposed,
    aten.convolution: _either_convolution,
    aten.convolution_backward: _convolution_backward,
    aten.scaled_dot_product_attention: _attention,
    aten.lstm: _recurrent,
    aten.gru: _recurrent,
    aten.rnn_tanh: _recurrent,
    aten.rnn_relu: _recurrent,
    RECURRENT_LAYER.overloadpacket: _recurrent,
    ATTENTION.overloadpacket: _attention,
    ATTENTION_BACKWARD.overloadpacket: _attention_backward,
    masked_attention: _masked_attention,
    padded_convolution: _convolution,
    **dict.fromkeys(WHERE, _attention_of_part),
    TILE.overloadpacket: _tile,
    TILE_BACKWARD.overloadpacket: _tile_backward,
    EXPERT_LINEAR.overloadpacket: _product(0),
    EXPERT_OUTER.overloadpacket: _expert_outer,
}
