"""Tensors that a model returns in memory of their own: who takes one may write to it, and nothing else changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

ALIASES = {torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default}  # in evaluation, their operand


def made_for_user(returned: Iterable[fx.Node]) -> set[fx.Node]:
    """The operators that make the memory of what is ``returned``: before them come views at most."""
    return {origin_of_memory(node) for node in returned}


def origin_of_memory(node: fx.Node) -> fx.Node:
    """The operator, or placeholder, that made the memory of ``node``, as far as torch's schemas tell."""
    while node.op == "call_function" and node.all_input_nodes and _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    schema: Any = getattr(node.target, "_schema", None)
    return (
        node.target in ALIASES
        or node.target is operator.getitem
        or (schema is not None and any(kind.alias_info for kind in schema.arguments[:1]))
    )
