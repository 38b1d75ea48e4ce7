"""The first passes on functions and models, as several tests look at them."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from autopar.frontend.trace import trace
from autopar.ir.program import Program
from autopar.ir.text import operator_name

aten = torch.ops.aten
PASSES = ("canonicalize", "lower_row_indexing", "recognise_masks", "fold_constants")


def rewrite(name: str, program: Program) -> Program:
    result = getattr(importlib.import_module(f"autopar.passes.{name}"), name)(program)
    assert isinstance(result, Program)
    return result


def canonical(program: Program) -> Program:
    for name in PASSES:
        program = rewrite(name, program)
    return program


def traced(model: nn.Module, *args: Any) -> Program:
    return trace(model, args)


def counts(program: Program) -> Counter[str]:
    return Counter(operator_name(node.target) for node in program.graph.nodes if node.op == "call_function")


def attentions(program: Program) -> list[tuple[Any, ...]]:
    attention = aten.scaled_dot_product_attention.default
    return [node.args[3:] for node in program.graph.nodes if node.target is attention]


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def body(program: Program) -> list[str]:
    return [line.strip() for line in str(canonical(program)).splitlines()[1:]]


def collectives(graph: fx.Graph) -> list[str]:
    """The names of the collectives of a graph, in order."""
    names = [operator_name(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name.removeprefix("comm.") for name in names if name.startswith("comm.")]
