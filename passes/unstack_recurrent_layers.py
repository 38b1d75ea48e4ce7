"""Write a stack of recurrent layers as one operator for each layer and direction, with the dropout between them.

    lstm = aten.lstm.input(x, [h0, c0], [...], True, 2, 0.1, True, False, False) : (f32[9,8,4], f32[2,8,4], f32[2,8,4])
    y    = lstm[0]                                                               : f32[9,8,4]
      -->
    h       = aten.select.int(h0, 0, 0)                                 : f32[8,4]
    c       = aten.select.int(c0, 0, 0)                                 : f32[8,4]
    layer   = autopar.recurrent_layer(x, [h, c], [...], 'lstm')         : (f32[9,8,4], f32[8,4])
    steps   = layer[0]                                                  : f32[9,8,4]
    dropout = aten.dropout(steps, 0.1, True)                            : f32[9,8,4]
    ...                                                                   the same for the second layer

Within one operator a dropout would draw other numbers on each mesh, and torch takes the operator apart as the device
of the moment has it. The backward direction is the forward one on reversed steps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.ir.graph_pass import graph_pass
from autopar.ir.layout import Layout
from autopar.ir.node import Value, value, values
from autopar.ir.program import Program
from autopar.ir.rewrite import insert_before, remove_unused, substitute
from autopar.operators.recurrent import RECURRENT_LAYER

aten = torch.ops.aten

CELLS = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}


@graph_pass()
def unstack_recurrent_layers(program: Program) -> Program:
    stacks = [node for node in program.graph.nodes if node.target in CELLS]
    for node in stacks:
        _unstack(node)
    if stacks:
        remove_unused(program.graph)
    return program


def _unstack(node: fx.Node) -> None:
    arguments: Any = node.args
    x, given, weights, _, count, dropout, train, bidirectional, batch_first = arguments
    states = list(given) if isinstance(given, (list, tuple)) else [given]
    ways = 2 if bidirectional else 1
    each = len(weights) // (count * ways)  # tensors of one layer and direction
    steps = _transposed(node, x) if batch_first else x
    finals: list[list[fx.Node]] = []
    for layer in range(count):
        sides = []
        for direction in range(ways):
            slot = layer * ways + direction
            own = [_picked(node, state, slot) for state in states]
            y, final = _layer(node, steps, own, weights[slot * each : (slot + 1) * each], direction == 1)
            sides.append(y)
            finals.append(final)
        steps = sides[0] if ways == 1 else _joined(node, sides)
        if dropout and train and layer < count - 1:
            steps = insert_before(node, aten.dropout.default, (steps, float(dropout), True), None, value(steps))
    results = [_transposed(node, steps) if batch_first else steps]
    results += [insert_before(node, aten.stack.default, (list(s),), None, t) for s, t in zip(zip(*finals), _rest(node))]
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        substitute(user, results[index])


def _rest(node: fx.Node) -> tuple[Value, ...]:
    """The types of the final states."""
    return values(node)[1:]


def _layer(
    node: fx.Node, steps: fx.Node, states: list[fx.Node], weights: list[fx.Node], reverse: bool
) -> tuple[fx.Node, list[fx.Node]]:
    """The steps (T, B, P) of one layer in one direction, and its final states."""
    length, batch, _ = value(steps).shape
    cell = CELLS[node.target]  # type: ignore[index]
    y_type = _typed(node, (length, *value(states[0]).shape))
    last_type = _typed(node, value(states[-1]).shape)
    source = _reversed(node, steps) if reverse else steps
    both = insert_before(node, RECURRENT_LAYER, (source, states, weights, cell), None, y_type, last_type)
    y = insert_before(node, operator.getitem, (both, 0), None, y_type)
    last = insert_before(node, operator.getitem, (both, 1), None, last_type)
    final = [last]
    if cell == "lstm":
        hidden = _typed(node, value(states[0]).shape)
        final = [insert_before(node, aten.select.int, (y, 0, length - 1), None, hidden), last]
    return _reversed(node, y) if reverse else y, final


def _typed(node: fx.Node, shape: tuple[int, ...]) -> Value:
    first = values(node)[0]
    return Value(first.dtype, Layout.whole(shape), first.requires_grad)


def _transposed(node: fx.Node, x: fx.Node) -> fx.Node:
    first, second, width = value(x).shape
    kind = Value(value(x).dtype, Layout.whole((second, first, width)), value(x).requires_grad)
    return insert_before(node, aten.transpose.int, (x, 0, 1), None, kind)


def _reversed(node: fx.Node, steps: fx.Node) -> fx.Node:
    return insert_before(node, aten.flip.default, (steps, [0]), None, value(steps))


def _picked(node: fx.Node, state: fx.Node, slot: int) -> fx.Node:
    kind = Value(value(state).dtype, Layout.whole(value(state).shape[1:]), value(state).requires_grad)
    return insert_before(node, aten.select.int, (state, 0, slot), None, kind)


def _joined(node: fx.Node, sides: list[fx.Node]) -> fx.Node:
    length, batch, width = value(sides[0]).shape
    return insert_before(node, aten.cat.default, (sides, 2), None, _typed(node, (length, batch, 2 * width)))
