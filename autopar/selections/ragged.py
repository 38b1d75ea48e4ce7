"""Sizes that depend on values, in a traced graph; what is said to a user whose rows cannot be traced."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.errors import TraceError
from autopar.ir.node import traced_origin, traced_value
from autopar.ir.operator_facts import is_pure
from autopar.ir.rewrite import operand
from autopar.ir.text import operator_name

aten = torch.ops.aten


class UnknownSize(TraceError):
    """What depends on how many rows a condition selects, where nothing but that number would help."""


def formula(node: fx.Node, levels: int) -> str:
    """The calls that make ``node``, down to some level; equal for values that are equal."""
    if node.op != "call_function" or levels == 0 or not is_pure(node.target):
        return node.name
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _Written(formula(source, levels - 1)))
    return f"{operator_name(node.target)}({args}, {kwargs})"


class _Written(str):
    """Text that is printed without quotes."""

    __repr__ = str.__str__


def traced_type(node: fx.Node) -> Any:
    """The fake value of ``node``. Of a loss for each of some rows torch says that it is one number."""
    fake = traced_value(node)
    if node.target is aten.cross_entropy_loss.default and ragged_sizes(traced_value(operand(node, 1))):
        reduction = node.args[3] if len(node.args) > 3 else node.kwargs.get("reduction", 1)
        fake = traced_value(operand(node, 1)) if reduction == 0 else fake
    return fake


def is_number(fake: Any) -> bool:
    return isinstance(fake, (int, torch.SymInt, torch.SymBool, type(None)))


def ragged_sizes(fake: Any) -> list[torch.SymInt]:
    """The sizes of a tensor, or of several, that depend on values."""
    if isinstance(fake, (list, tuple)):
        return [size for part in fake for size in ragged_sizes(part)]
    return [size for size in getattr(fake, "shape", ()) if isinstance(size, torch.SymInt)]


def ragged_dim(node: fx.Node, fake: Any) -> int:
    """The one dim of a tensor whose size depends on values. Raises TraceError for none or several."""
    dims = [dim for dim, size in enumerate(getattr(fake, "shape", ())) if isinstance(size, torch.SymInt)]
    if len(dims) != 1:
        raise refusal(node, f"{name_of(node)} does not keep them as rows of its result")
    return dims[0]


def name_of(node: fx.Node) -> str:
    return operator_name(node.target)


def refusal(node: fx.Node, problem: str, way_out: str = "") -> UnknownSize:
    way_out = way_out or "torch.where or a mask instead of boolean indexing and nonzero"
    return UnknownSize(
        f"the size of a tensor depends on the values in another one, since rows are selected by a condition. Rows that "
        f"are each treated alone, and added to a tensor of all rows, can be traced; here {problem}\n"
        f"  at {traced_origin(node).source}\n"
        f"Way out: keep sizes fixed, e.g. {way_out}."
    )


def column_added_to(column: fx.Node) -> int | None:
    """The number of ``column`` among its kind, if rows are added at its positions."""
    if column.target is not operator.getitem:
        return None
    for user in column.users:
        if user.target is aten.index_add.default and user.args[2] is column:
            return whole_number(column.args[1])
        if user.target is aten.index_put.default and column in user.args[1]:  # type: ignore[operator]
            return whole_number(column.args[1])
    return None


def whole_number(number: Any) -> int:
    assert isinstance(number, int)
    return number


def dim_argument(node: fx.Node, position: int, default: int, rank: int) -> int:
    """The dim that an argument names, counted from the front."""
    return whole_number(node.args[position] if len(node.args) > position else default) % rank
