"""The nodes of a backward graph that are gradients of parameters: of what they give, nothing else is computed."""

from __future__ import annotations

import torch
from torch import fx

from autopar.autodiff.hoist import ARRANGING, REDUCING
from autopar.ir.node import Node, output_node
from autopar.ir.operator_facts import is_view

ADDING = torch.ops.aten.add.Tensor


def gradients_in(graph: fx.Graph, at_once: int) -> frozenset[Node]:
    """Gradients before and after they are reduced, arranged and added up.

    ``at_once``: how many results come first that are gradients of other values.
    """
    end = output_node(graph)
    results = end.args[0]
    assert isinstance(results, (list, tuple))
    now, carrying, found = set(results[:at_once]), {end}, set[Node]()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node in now or not node.users:
            continue
        if all(user in carrying for user in node.users):
            found.add(node)
            if is_view(node.target) or node.target in (*ARRANGING, *REDUCING, ADDING):
                carrying.add(node)
    return frozenset(found)
