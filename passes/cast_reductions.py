"""Sum the gradients of parameters over ranks in the dtype that the plan asks for (``Precision.reduce``).

before, on mesh(dp=2), Plan(precision=Precision(reduce='float32')):
  forward:
    p = param w : f32[8@dp,4]
    return
  backward:
    t = saved                             : bf16[8,6]
    x = saved                             : bf16[6,4]
    w = aten.mm(t, x)                     : bf16[8,4]
    r = comm.reduce_scatter(w, dp, dim=0) : bf16[4,4]
    g = aten._to_copy(r, dtype=f32)       : f32[4,4]
    return w=g
after:
  backward:
    t       = saved                                   : bf16[8,6]
    x       = saved                                   : bf16[6,4]
    w       = aten.mm(t, x)                           : bf16[8,4]
    to_copy = aten._to_copy(w, dtype=f32)             : f32[8,4]
    r       = comm.reduce_scatter(to_copy, dp, dim=0) : f32[4,4]
    return w=r

Differentiation casts a gradient to the dtype of its parameter after its reduction. This pass casts it before; a cast
remains where the parameter has a third dtype. Sums of activations stay in the dtype of computing.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.collectives import CUTS, REDUCTIONS
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import output_node, set_values, value
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program
from autopar.ir.rewrite import operand, substitute
from autopar.ir.tables import InputKind, Role

aten = torch.ops.aten
TO = aten._to_copy.default
PASSING_ON = (  # what may stand between a sum over ranks and a gradient, and gives the dtype that it takes
    *REDUCTIONS, *CUTS, aten.add.Tensor, aten.clone.default,
)  # fmt: skip


@graph_pass(when=lambda program: program.plan.precision.reduce_dtype is not None)
def cast_reductions(program: Program) -> Program:
    dtype = program.plan.precision.reduce_dtype
    assert dtype is not None
    parameters = {entry.target for _, entry in program.placeholders(InputKind.PARAMETER)}
    role = program.required_role
    if role.backward is not None:
        _cast(role.backward, _reduced(role, role.backward, parameters), dtype)
    return program


def _reduced(role: Role, graph: fx.Graph, parameters: Set[str]) -> dict[fx.Node, torch.dtype]:
    """The sums over ranks of values that only gradients of parameters use, and everything after them; their dtypes."""
    last = output_node(graph)
    returned: tuple[fx.Node, ...] = last.args[0]  # type: ignore[assignment]
    others = {node for node, target in zip(returned, role.grads) if target not in parameters}
    ends = {last}
    for node in reversed(graph.nodes):
        passes_on = node.target in (*PASSING_ON, TO) or (node.op == "call_function" and is_view(node.target))
        if passes_on and node not in others and node.users and all(user in ends for user in node.users):
            ends.add(node)
    found: dict[fx.Node, torch.dtype] = {}
    for node in graph.nodes:
        if node in ends and (node.target in REDUCTIONS or any(source in found for source in node.all_input_nodes)):
            found[node] = value(node).dtype if node is not last else torch.float32
    found.pop(last, None)
    return found


def _cast(graph: fx.Graph, reduced: dict[fx.Node, torch.dtype], dtype: torch.dtype) -> None:
    last, casts = output_node(graph), dict[fx.Node, fx.Node]()
    for node in reduced:
        for source in node.all_input_nodes:
            if source not in reduced and value(source).dtype != dtype:
                if source not in casts:
                    casts[source] = Builder(before=node).cast(source, dtype)
                node.replace_input_with(source, casts[source])
        set_values(node, replace(value(node), dtype=dtype))
    for node, before in reduced.items():
        if last in node.users and before != dtype:
            own = Builder(before=last).cast(node, before)
            node.replace_all_uses_with(own, delete_user_cb=lambda user: user is last)
    for node in reduced:
        if node.target is TO:
            substitute(node, operand(node))
