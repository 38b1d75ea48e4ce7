"""``if rows.shape[0] == 0: continue``: what a model does where a condition selects nothing, found without a branch.

A graph has no branches, and how many rows are selected is known at run time only. The model is traced twice: as if each
condition selected some row, and as if each selected none. Where both graphs compute the same but for the rows that the
first one adds or puts back, the first serves every batch: it adds nothing where nothing is selected. But for a loop
that ends at the first condition without a row (``break``): then fewer conditions are asked.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch import _check as assume
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.ir.node import output_node, traced_value
from autopar.observation.source_lines import Place, place_of_user

aten = torch.ops.aten
PUTS_BACK = {  # operator -> the place of the rows' positions
    aten.index_add.default: 2, aten.index_add_.default: 2, aten.index_put.default: 1, aten.index_put_.default: 1,
}  # fmt: skip


class Selections(TorchFunctionMode):
    """Within this context, each condition selects at least one row, or (``empty``) none.

    ``places``: how often rows were selected at each place of the user's code.
    """

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.places = Counter[Place]()
        self._empty = empty
        self._known: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            for size in leaf.shape if isinstance(leaf, Tensor) else ():
                if isinstance(size, torch.SymInt) and free_unbacked_symbols(size) and str(size) not in self._known:
                    self._known.add(str(size))
                    self.places[place_of_user()] += 1
                    assume(size == 0 if self._empty else size >= 1)
        return result


def leave_out_rounds(some: Selections, none: Selections) -> bool:
    """Whether each place selects as often in both runs, or (where no row is selected) never: no loop has ended."""
    return all(none.places[place] in (0, count) for place, count in some.places.items())


def differ_by_selections_only(some: fx.Graph, none: fx.Graph) -> bool:
    """Whether the graphs return the same, where rows that are selected are not put back."""
    written: dict[str, int] = {}
    return _formulas(some, written) == _formulas(none, written)


def _formulas(graph: fx.Graph, written: dict[str, int]) -> list[Any]:
    """A number for each value that the graph returns; equal ones for equal formulas, by the table ``written``."""
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.target in PUTS_BACK and _is_selection(node):
            numbers[node] = numbers[node.all_input_nodes[0]]
            continue
        args = fx.map_arg((node.args, node.kwargs), lambda source: f"#{numbers[source]}")
        name = node.name if node.op != "call_function" else str(node.target)
        text = f"{name} {args}" if node.target is not operator.getitem else f"item {args}"
        numbers[node] = written.setdefault(text, len(written))
    (returned,) = output_node(graph).args
    return pytree.tree_leaves(fx.map_arg(returned, lambda node: f"#{numbers[node]}"))


def _is_selection(node: fx.Node) -> bool:
    """Whether the rows that are put back are those of a condition, or none."""
    sizes = [size for source in node.all_input_nodes for size in getattr(traced_value(source), "shape", ())]
    return any(isinstance(size, torch.SymInt) or size == 0 for size in sizes)
