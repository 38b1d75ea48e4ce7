"""A model that asks how many rows a batch has, and does something else for a microbatch than for the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError, TraceError
from autopar.frontend.size_questions import questions
from autopar.ir.batch import of_rows
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program

ROWS = "b"


def check_rows_asked(
    model: nn.Module, part: Mapping[str, Any], dims: Mapping[str, int], whole: int,
    traced: Callable[[Mapping[str, Any]], Program],
) -> None:  # fmt: skip
    """Raise InvariantError where the model does something else for ``part``, a microbatch, than for ``whole`` rows.

    ``dims``: the batch dim of each input that has one. The model is ``traced`` for both where a question of the user's
    code has another answer for the whole.
    """
    rows = next((part[name].shape[dim] for name, dim in dims.items()), whole)
    if rows == whole or any(part[name].shape[dim] != rows for name, dim in dims.items()):
        return
    like = max(rows, 2)  # one row is no symbol
    shapes = [
        [ROWS if dims.get(name) == dim else size for dim, size in enumerate(value.shape)]
        for name, value in part.items()
        if isinstance(value, Tensor)
    ]
    asked = [one for one in questions(model, (), _of_rows(part, dims, like), shapes, {ROWS: like}) if one.line]
    other = [one for one in asked if one.holds({ROWS: rows}) != one.holds({ROWS: whole})]
    if not other:
        return
    try:
        of_whole = traced(_of_rows(part, dims, whole))
    except TraceError:  # the model takes a microbatch, and no batch
        return
    is_asked = any(not one.is_number for one in other)
    if _are_alike(traced(_of_rows(part, dims, rows)), rows, of_whole, whole, is_asked):
        return
    lines = "\n".join(f"  {one.told}" for one in other)
    raise InvariantError(
        f"the model does something else for a microbatch of {rows} rows than for the batch of {whole}: forward asks "
        f"how many rows there are\n{lines}\n"
        'Way out: Plan(microbatch_weights="rows"): the mean of the losses of the microbatches, as in accumulating '
        "gradients by hand; Plan(microbatches=1); or a forward pass that does not ask."
    )


def _are_alike(one: Program, rows: int, other: Program, others: int, is_asked: bool) -> bool:
    """Whether two traces, of so many rows, compute the same.

    ``is_asked``: with numbers that are equal, or in proportion. Where Python only makes numbers of the rows these may
    be others: what is computed with them is left to :mod:`autopar.split.summands`. Where one of the two is of a single
    row, views are left out: of one row there are fewer.
    """
    mine, theirs = (
        [
            node
            for node in program.graph.nodes
            if node.op == "call_function" and not (1 in (rows, others) and is_view(node.target))
        ]
        for program in (one, other)
    )
    return len(mine) == len(theirs) and all(
        a.target == b.target and (not is_asked or _are_numbers_alike(_numbers(a), rows, _numbers(b), others))
        for a, b in zip(mine, theirs)
    )


def _are_numbers_alike(mine: list[Any], rows: int, theirs: list[Any], others: int) -> bool:
    """Whether they are equal, or in proportion to a power of the rows: a mean of pairs has a square."""
    ratio = Fraction(others, rows)
    return len(mine) == len(theirs) and all(
        a == b or any(math.isclose(b, a * ratio**power) for power in (-2, -1, 1, 2)) for a, b in zip(mine, theirs)
    )


def _numbers(node: fx.Node) -> list[Any]:
    """The numbers among the arguments of ``node``."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if type(leaf) in (int, float)]


def _of_rows(part: Mapping[str, Any], dims: Mapping[str, int], rows: int) -> dict[str, Any]:
    return {name: of_rows(value, dims[name], rows) if name in dims else value for name, value in part.items()}
