"""Write a stack of recurrent layers as one operator for each layer and direction, with the dropout between them.

before:
  x   = input                                                                      : f32[9,8,4]
  h   = input                                                                      : f32[2,8,4]
  u   = param u                                                                    : f32[4,4]
  v   = param v                                                                    : f32[4,4]
  w   = param w                                                                    : f32[4,4]
  z   = param z                                                                    : f32[4,4]
  rnn = aten.rnn_tanh.input(x, h, [u, v, w, z], False, 2, 0.1, True, False, False) : (f32[9,8,4], f32[2,8,4])
  y   = rnn[0]                                                                     : f32[9,8,4]
  return y
after:
  x                 = input                                                            : f32[9,8,4]
  h                 = input                                                            : f32[2,8,4]
  u                 = param u                                                          : f32[4,4]
  v                 = param v                                                          : f32[4,4]
  w                 = param w                                                          : f32[4,4]
  z                 = param z                                                          : f32[4,4]
  select            = aten.select.int(h, 0, 0)                                         : f32[8,4]
  recurrent_layer   = autopar.recurrent_layer(x, [select], [u, v], "rnn_tanh")         : (f32[9,8,4], f32[8,4])
  getitem           = recurrent_layer[0]                                               : f32[9,8,4]
  dropout           = aten.dropout(getitem, 0.1, True)                                 : f32[9,8,4]
  select_1          = aten.select.int(h, 0, 1)                                         : f32[8,4]
  recurrent_layer_1 = autopar.recurrent_layer(dropout, [select_1], [w, z], "rnn_tanh") : (f32[9,8,4], f32[8,4])
  getitem_2         = recurrent_layer_1[0]                                             : f32[9,8,4]
  return getitem_2

Within one operator a dropout would draw other numbers on each mesh, and torch decomposes the operator differently on
each device. The backward direction is the forward one on reversed steps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import calls, graph_pass
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused, substitute
from autopar.operators.recurrent import RECURRENT_LAYER

aten = torch.ops.aten

CELLS = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}


@graph_pass(when=calls(lambda target: target in CELLS))
def unstack_recurrent_layers(program: Program) -> Program:
    stacks = [node for node in program.graph.nodes if node.target in CELLS]
    for node in stacks:
        _unstack(node)
    remove_unused(program.graph)
    return program


def _unstack(node: fx.Node) -> None:
    arguments: Any = node.args
    x, given, weights, _, count, dropout, train, bidirectional, batch_first = arguments
    states = list(given) if isinstance(given, (list, tuple)) else [given]
    cell, ways = CELLS[node.target], 2 if bidirectional else 1  # type: ignore[index]
    each = len(weights) // (count * ways)  # tensors of one layer and direction
    op = Builder(before=node)
    steps = op(aten.transpose.int, x, 0, 1) if batch_first else x
    finals: list[list[fx.Node]] = []
    for layer in range(count):
        sides = []
        for direction in range(ways):
            slot = layer * ways + direction
            own = [op(aten.select.int, state, 0, slot) for state in states]
            y, final = _layer(op, cell, steps, own, weights[slot * each : (slot + 1) * each], reverse=direction == 1)
            sides.append(y)
            finals.append(final)
        steps = sides[0] if ways == 1 else op(aten.cat.default, sides, 2)
        if dropout and train and layer < count - 1:
            steps = op(aten.dropout.default, steps, float(dropout), True)
    results = [op(aten.transpose.int, steps, 0, 1) if batch_first else steps]
    results += [op(aten.stack.default, list(states)) for states in zip(*finals)]
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        substitute(user, results[index])


def _layer(
    op: Builder, cell: str, steps: fx.Node, states: list[fx.Node], weights: list[fx.Node], reverse: bool
) -> tuple[fx.Node, list[fx.Node]]:
    """The steps (T, B, P) of one layer in one direction, and its final states."""
    source = op(aten.flip.default, steps, [0]) if reverse else steps
    both = op(RECURRENT_LAYER, source, states, weights, cell)
    y, last = op(operator.getitem, both, 0), op(operator.getitem, both, 1)
    final = [op(aten.select.int, y, 0, value(y).shape[0] - 1), last] if cell == "lstm" else [last]
    return op(aten.flip.default, y, [0]) if reverse else y, final
