"""Take the parameters that are stacked, one for each expert, as one parameter of the program.

Where experts are dealt out, over ``ep`` or as the plan says, a rank then holds the matrices of its experts, and no
others. The parameter has the model's name with ``*`` for the number of the expert (``ir/stacked_parameters.py``).
Parameters that anything else uses too, or that differ in their dtype at the border, stay as they are.

before, on mesh(ep=2):
  a             = param experts.0.weight                   : f32[6,6]
  b             = param experts.1.weight                   : f32[6,6]
  x             = input x                                  : f32[5,6]
  ids           = input ids                                : i64[5]
  stack         = aten.stack([a, b])                       : f32[2,6,6]
  expert_linear = autopar.expert_linear(x, stack, ids)     : f32[5,6]
  return expert_linear
after:
  a_stacked     = param "experts.*.weight"                 : f32[2,6,6]
  x             = input x                                  : f32[5,6]
  ids           = input ids                                : i64[5]
  expert_linear = autopar.expert_linear(x, a_stacked, ids) : f32[5,6]
  return expert_linear
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from autopar.ir.fast_graph import called, calls_of
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, placeholders_match_inputs
from autopar.ir.node import origin, set_origin, set_values, value
from autopar.ir.program import Program
from autopar.ir.rewrite import substitute
from autopar.ir.stacked_parameters import stacked_name
from autopar.ir.tables import Input, InputKind
from autopar.routing.groups import is_asked_for

STACK = torch.ops.aten.stack.default


@graph_pass(
    ensures=(every_value_has_a_layout, placeholders_match_inputs),
    when=lambda program: isinstance(program, Program) and is_asked_for(program) and STACK in called(program.graph),
)
def stack_parameters(program: Program) -> Program:
    entries = dict(program.placeholders(InputKind.PARAMETER))
    for node in calls_of(program.graph, [STACK]):
        name = _name(node, entries, program.pins.dtypes)
        if name is not None:
            program = _with_stack(program, node, name)
    return program


def _name(node: fx.Node, entries: Mapping[fx.Node, Input], dtypes: Mapping[str, torch.dtype]) -> str | None:
    """The name of the parameter in place of ``node``, a stack; None where that is not of parameters of its own."""
    if len(node.args) > 1:
        return None
    members = node.all_input_nodes
    own = all(member in entries and len(member.users) == 1 and not entries[member].aliases for member in members)
    if not own or len({dtypes.get(member.name) for member in members}) > 1:
        return None
    return stacked_name([entries[member].target for member in members])


def _with_stack(program: Program, node: fx.Node, name: str) -> Program:
    """``program`` with a parameter ``name`` in place of ``node`` and of the parameters that it stacks."""
    members: Sequence[fx.Node] = node.all_input_nodes
    first, gone = members[0], {member.name for member in members}
    with program.graph.inserting_before(first):
        stack = program.graph.placeholder(f"{first.name}_stacked")
    set_values(stack, value(node))
    set_origin(stack, origin(first))
    substitute(node, stack)
    for member in members:
        program.graph.erase_node(member)
    inputs = [
        Input(stack.name, InputKind.PARAMETER, name) if entry.node == first.name else entry
        for entry in program.inputs
        if entry.node == first.name or entry.node not in gone
    ]
    dtypes = {key: dtype for key, dtype in program.pins.dtypes.items() if key not in gone}
    if first.name in program.pins.dtypes:
        dtypes[stack.name] = program.pins.dtypes[first.name]
    return replace(program, inputs=tuple(inputs), pins=replace(program.pins, dtypes=dtypes))
