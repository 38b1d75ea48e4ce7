"""Give parameters and floating inputs their dtype at the border, and cast them to the dtype of computing.

before, on mesh(), Plan(precision=Precision(output='float32')), with w=torch.float32, x=torch.float32:
  w = param w           : bf16[8,4]
  x = input             : bf16[2,4]
  y = aten.linear(x, w) : bf16[2,8]
  return y
after:
  w         = param w                         : f32[8,4]
  x         = input                           : f32[2,4]
  to_copy   = aten._to_copy(w, dtype=bf16)    : bf16[8,4]
  to_copy_1 = aten._to_copy(x, dtype=bf16)    : bf16[2,4]
  y         = aten.linear(to_copy_1, to_copy) : bf16[2,8]
  to_copy_2 = aten._to_copy(y, dtype=f32)     : f32[2,8]
  return to_copy_2

Tracing has seen the model in the dtype of computing, so all operators are right already; ``Pins.dtypes`` holds the
dtypes at the border. Each rank casts its part of a parameter: the cast is gathered in the dtype of computing, and the
gradient arrives in the parameter's own. Floating outputs are cast last (``Precision.output``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import output_node, set_values, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, OutputKind

TO = torch.ops.aten._to_copy.default


@graph_pass(when=lambda program: bool(program.pins.dtypes) or program.plan.precision.output_dtype is not None)
def cast_parameters(program: Program) -> Program:
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    for node, _ in program.placeholders(InputKind.PARAMETER, InputKind.INPUT):
        if node.name in program.pins.dtypes:
            _cast_input(node, program.pins.dtypes[node.name], order)
    dtype = program.plan.precision.output_dtype
    if dtype is not None:
        _cast_outputs(program, dtype)
    return replace(program, pins=replace(program.pins, dtypes={}))


def _cast_input(node: fx.Node, passed: torch.dtype, order: dict[fx.Node, int]) -> None:
    computing = value(node)
    if node.users:
        first = min(node.users, key=order.__getitem__)
        cast = Builder(before=first)(TO, node, dtype=computing.dtype, like=computing)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    set_values(node, replace(computing, dtype=passed))


def _cast_outputs(program: Program, dtype: torch.dtype) -> None:
    last = output_node(program.graph)
    results = list(program.returned)
    for position, (entry, node) in enumerate(zip(program.outputs, results)):
        kind = value(node)
        if entry.kind is OutputKind.USER and kind.dtype.is_floating_point and kind.dtype != dtype:
            results[position] = Builder(before=last).cast(node, dtype)
    last.args = (tuple(results),)
