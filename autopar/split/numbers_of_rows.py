"""Numbers in a graph that are made of the number of rows: ``sum() / len(x)``, ``h * x.shape[0] ** -0.5``.

A trace has them as numbers like any other, or as constants (``torch.tensor(len(x))``). Two traces of different
batches tell them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autopar.ir.node import Node
from autopar.ir.program import Program
from autopar.ir.tables import InputKind

aten = torch.ops.aten
_BY_SIZE = (aten.arange.default, aten.arange.start, aten.arange.start_step)  # have as many elements as a number says


def has_numbers(program: Program, nodes: Collection[Node]) -> bool:
    """Whether something among ``nodes`` computes with a number, or with a constant."""
    return any(next(numbers_of(program, node), None) is not None for node in nodes)


def numbers_of(program: Program, node: Node) -> Iterator[float | Tensor]:
    """The numbers with which ``node`` computes, and the constants: not its dims and sizes."""
    if isinstance(node.target, torch._ops.OpOverload):
        yield from _by_schema(node.target, node.args, node.kwargs)
    else:
        yield from (one for one in (*node.args, *node.kwargs.values()) if isinstance(one, float))
    names = constant_names(program)
    for source in operands_of(node):
        constant = program.constants.get(names.get(source.name, ""))
        if constant is not None and not isinstance(constant, FakeTensor):
            yield constant


def _by_schema(target: Any, args: Collection[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
    if target in _BY_SIZE:
        return
    arguments = target._schema.arguments
    given = dict(zip((one.name for one in arguments), args)) | dict(kwargs)
    for one in arguments:
        number, kind = given.get(one.name), str(one.type)
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and one.name != "eps" and any(name in kind for name in ("number", "float", "Tensor")):
            yield number  # type: ignore[misc]


def operands_of(node: Node) -> list[Node]:
    """In their order, each as often as ``node`` takes it."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def constant_names(program: Program) -> dict[str, str]:
    """The placeholders of constants, each with the name of its constant."""
    return {entry.node: entry.target for entry in program.inputs if entry.kind is InputKind.CONSTANT}


def is_moved(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether they are different numbers; what has a dim of the rows has another shape, and is known by it."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and not torch.equal(one, other)
    return isinstance(one, Tensor) or isinstance(other, Tensor) or one != other


def is_in_proportion(one: float | Tensor, rows: int, other: float | Tensor, others: int) -> bool:
    """Whether ``one`` is to ``rows`` as ``other`` is to ``others``."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one * others, other * rows)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one * others == other * rows


def shown(numbers: Collection[float | Tensor]) -> list[Any]:
    """In a message."""
    return [one.tolist() if isinstance(one, Tensor) and one.numel() == 1 else one for one in numbers]
