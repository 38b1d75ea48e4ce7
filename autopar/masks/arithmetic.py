"""Pointwise operators on values: sums of letters, tables of a few numbers, tensors that are hidden in part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.evaluate import FILLED
from autopar.ir.node import value
from autopar.ir.operator_facts import packet_of
from autopar.masks import truth
from autopar.masks.compare import RELATIONS, compared
from autopar.masks.indices import Index
from autopar.masks.values import Affine, Bias, Choice, Distance, Masked, Number, Plain, Quotient, Value

aten = torch.ops.aten

HIDDEN = -65504.0  # the smallest float16: exp(it - anything) is 0
EXACT = 2**24  # integers up to it are exact in float32
MOST_PARTS = 4  # of a table: 16 rows

RANGES: dict[Any, Callable[..., tuple[Any, Any]]] = {  # the first number, and the step
    aten.arange.default: lambda end: (0, 1),
    aten.arange.start: lambda start, end: (start, 1),
    aten.arange.start_step: lambda start, end, step=1: (start, step),
}

Sizes = Mapping[str, int]


def start_of(node: fx.Node, index: Index) -> Value | None:
    """The value of a node that makes numbers: an ``arange``, or one number everywhere."""
    if node.target in FILLED:
        number = FILLED[node.target](node)
        return (
            Number(torch.tensor(number, dtype=value(node).dtype).item()) if isinstance(number, (int, float)) else None
        )
    if node.target not in RANGES:
        return None
    start, step = RANGES[node.target](*node.args)
    if (
        not isinstance(start, int)
        or not isinstance(step, int)
        or not _is_exact(node, (start, start + step * value(node).shape[0]))
    ):
        return None
    return index[0].times(step).plus(Affine((), start))


def _is_exact(node: fx.Node, ends: tuple[int, int]) -> bool:
    """Whether the dtype of ``node`` holds these integers."""
    dtype = value(node).dtype
    if dtype in (torch.int64, torch.float64):
        return True
    return dtype in (torch.int32, torch.float32) and max(map(abs, ends)) <= EXACT


def applied(
    node: fx.Node, operands: Sequence[Value], raw: Sequence[Value], sizes: Sizes, number_of: Callable[[Value], int]
) -> Value | None:
    """The value of a pointwise ``node``; None where it is none of these kinds.

    ``operands``: bool vectors as terms; ``raw``: as vectors. ``number_of`` numbers vectors.
    """
    packet = packet_of(node)
    if packet in RELATIONS and len(raw) == 2:
        found = compared(RELATIONS[packet], raw[0], raw[1], number_of, sizes)
        if found is not None:
            return found
    if packet in _SUMS and any(isinstance(operand, Affine) for operand in raw):
        found = _SUMS[packet](node, raw, sizes)
        if found is not None:
            return found
    if packet in (aten.where, aten.masked_fill) and len(operands) == 3:
        first, second, third = operands
        condition, yes, no = (first, second, third) if packet is aten.where else (second, third, first)
        found = hidden_part(condition, yes, no)
        if found is not None:
            return found
    if packet is aten.add and len(operands) == 2:
        found = _added(*operands) or _added(operands[1], operands[0])
        if found is not None:
            return found
    if packet is aten._to_copy and isinstance(operands[0], Masked) and value(node).dtype.is_floating_point:
        return operands[0]
    return table(node, operands)


# ---------------------------------------------------------------- sums of letters


def _as_sum(operand: Value) -> Affine | None:
    if isinstance(operand, Number) and isinstance(operand.number, int):
        return Affine((), int(operand.number))
    return operand if isinstance(operand, Affine) else None


def _plus(sign: int, turned: bool = False) -> Callable[[fx.Node, Sequence[Value], Sizes], Value | None]:
    def add(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
        a, b = (_as_sum(operand) for operand in operands[:2])
        if a is None or b is None or node.kwargs or len(operands) > 2:
            return None
        return _number_if_constant(b.plus(a, sign) if turned else a.plus(b, sign))

    return add


def _number_if_constant(found: Affine) -> Value:
    return found if found.factors else Number(found.constant)


def _times(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    a, b = (_as_sum(operand) for operand in operands)
    if a is None or b is None or (a.factors and b.factors):
        return None
    return _number_if_constant(a.times(b.constant) if a.factors else b.times(a.constant))


def _negated(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    a = _as_sum(operands[0])
    return None if a is None else a.times(-1)


def _absolute(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    a = _as_sum(operands[0])
    if a is None:
        return None
    return a if a.bounds(sizes)[0] >= 0 else Distance(a)


def _quotient(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    """Of numbers that are not negative, where rounding down and towards zero are the same."""
    a, b = (_as_sum(operand) for operand in operands)
    rounded = packet_of(node) is aten.floor_divide or node.kwargs.get("rounding_mode") in ("floor", "trunc")
    if not rounded or a is None or b is None or b.factors or b.constant <= 0 or a.bounds(sizes)[0] < 0:
        return None
    if a.bounds(sizes)[1] < b.constant:
        return Number(0)
    ((letter, factor),) = a.factors if len(a.factors) == 1 else (("", 0),)
    return Quotient(letter, b.constant) if factor == 1 and a.constant == 0 else None


def _remainder(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    a, b = (_as_sum(operand) for operand in operands)
    if a is None or b is None or b.factors:
        return None
    low, high = a.bounds(sizes)
    return a if low >= 0 and high < b.constant else None


def _cast(node: fx.Node, operands: Sequence[Value], sizes: Sizes) -> Value | None:
    a = _as_sum(operands[0])
    return a if a is not None and _is_exact(node, a.bounds(sizes)) else None


_SUMS: dict[Any, Callable[[fx.Node, Sequence[Value], Sizes], Value | None]] = {
    aten.add: _plus(1),
    aten.sub: _plus(-1),
    aten.rsub: _plus(-1, turned=True),
    aten.mul: _times,
    aten.neg: _negated,
    aten.abs: _absolute,
    aten.floor_divide: _quotient,
    aten.div: _quotient,
    aten.remainder: _remainder,
    aten._to_copy: _cast,
}

# ---------------------------------------------------------------- two numbers


def table(node: fx.Node, operands: Sequence[Value]) -> Value | None:
    """The value of an operator on numbers and choices of two numbers, by running it on each combination of them."""
    sources = [arg for arg in node.args if isinstance(arg, (fx.Node, bool, int, float))]

    def run(rows: Sequence[Sequence[Plain]]) -> list[Plain] | None:
        columns = iter(zip(*rows))
        args = []
        for arg in node.args:
            column = next(columns) if isinstance(arg, (fx.Node, bool, int, float)) else ()
            args.append(torch.tensor(column, dtype=value(arg).dtype) if isinstance(arg, fx.Node) else arg)
        try:
            found = node.target(*args, **node.kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        return found.expand(len(rows)).tolist() if isinstance(found, Tensor) else None  # type: ignore[no-any-return]

    if len(sources) != len(operands) or any(isinstance(entry, fx.Node) for entry in node.kwargs.values()):
        return None
    return _table(operands, run)


def chosen(condition: Value | None, yes: Value, no: Value) -> Value | None:
    """``yes`` where the condition holds, else ``no``."""
    if condition is None:
        return None
    found = hidden_part(condition, yes, no)
    return found or _table((condition, yes, no), lambda rows: [a if c else b for c, a, b in rows])


def _table(operands: Sequence[Value], run: Callable[[Sequence[Sequence[Plain]]], list[Plain] | None]) -> Value | None:
    if not all(isinstance(operand, (Number, Choice)) for operand in operands):
        return None
    parts = list(dict.fromkeys(operand.truth for operand in operands if isinstance(operand, Choice)))
    if len(parts) > MOST_PARTS:
        return None
    states = [tuple(bool(number >> n & 1) for n in range(len(parts))) for number in range(2 ** len(parts))]
    rows = [[_in_state(operand, parts, state) for operand in operands] for state in states]
    results = run(rows)
    if results is None or any(result != result for result in results):
        return None
    hidden = [result for result in results if not isinstance(result, bool) and result <= HIDDEN]
    results = [max(hidden) if not isinstance(result, bool) and result <= HIDDEN else result for result in results]
    least, most = min(results), max(results)
    if least == most:
        return Number(most)
    if any(result not in (least, most) for result in results):
        return None
    shown = {state for state, result in zip(states, results) if result == most}
    return Choice(truth.of_table(parts, lambda state: state in shown), most, least)


def _in_state(operand: Value, parts: Sequence[truth.Truth], state: Sequence[bool]) -> Plain:
    if isinstance(operand, Choice):
        return operand.yes if state[parts.index(operand.truth)] else operand.no
    assert isinstance(operand, Number)
    return operand.number


# ---------------------------------------------------------------- tensors that are hidden in part


def is_hidden(operand: Value) -> bool:
    return isinstance(operand, Number) and not isinstance(operand.number, bool) and operand.number <= HIDDEN


def hidden_part(condition: Value, yes: Value, no: Value) -> Value | None:
    """A bias where the condition holds, hidden elsewhere; or the other way round."""
    if isinstance(condition, Number):
        return yes if condition.number else no
    if not isinstance(condition, Choice) or not isinstance(condition.yes, bool):
        return None
    shown = condition.truth
    if is_hidden(yes) and not is_hidden(no):
        yes, no, shown = no, yes, truth.opposite(shown)
    if not is_hidden(no) or not isinstance(no, Number):
        return None
    if isinstance(yes, Bias):
        return Masked(yes, shown, no.number)
    return (
        Masked(yes.bias, truth.both(yes.truth, shown), max(yes.hidden, no.number)) if isinstance(yes, Masked) else None
    )


def _added(tensor: Value, mask: Value) -> Value | None:
    """A bias plus 0 or a number that hides."""
    if not isinstance(mask, Choice) or mask.yes != 0 or not is_hidden(Number(mask.no)):
        return None
    if isinstance(tensor, Bias):
        return Masked(tensor, mask.truth, mask.no)
    if isinstance(tensor, Masked):
        return Masked(tensor.bias, truth.both(tensor.truth, mask.truth), max(tensor.hidden, mask.no))
    return None
