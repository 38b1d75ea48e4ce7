"""The vectors of a formula as nodes of a graph: (batch..., positions), from the values that a reading found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.node import value
from autopar.masks.values import Affine, Applied, Leaf, Number, Quotient, Value, Vector

aten = torch.ops.aten

HERE = torch.device("cpu")  # emitted as the device of the rank


def emitted(op: Builder, vector: Value, letter: str, sizes: Mapping[str, int], first_batch: int) -> fx.Node:
    """The node of a vector along ``letter``. ``first_batch``: the number of the innermost batch dim, from the right."""
    match vector:
        case Vector(Leaf() as leaf):
            return _leaf(op, leaf, letter, sizes, first_batch)
        case Vector(Applied(node, operands)):
            found = iter(operands)
            args = [
                _operand(op, arg, next(found), letter, sizes, first_batch) if _is_operand(arg) else arg
                for arg in node.args
            ]
            return op(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
        case Affine(factors, constant):
            positions = op(aten.arange.default, sizes[letter], device=HERE)
            ((_, factor),) = factors
            scaled = positions if factor == 1 else op(aten.mul.Tensor, positions, factor)
            return scaled if constant == 0 else op(aten.add.Tensor, scaled, constant)
        case Quotient(_, size):
            positions = op(aten.arange.default, sizes[letter], device=HERE)
            return op(aten.div.Tensor_mode, positions, size, rounding_mode="floor")
    raise AssertionError(vector)


def _is_operand(arg: object) -> bool:
    return isinstance(arg, (fx.Node, bool, int, float))


def _operand(
    op: Builder, arg: object, operand: Value, letter: str, sizes: Mapping[str, int], first_batch: int
) -> fx.Node | object:
    if not isinstance(arg, fx.Node):
        return arg
    if isinstance(operand, Number):
        return op(aten.full.default, [], operand.number, dtype=value(arg).dtype, device=HERE)
    return op.cast(emitted(op, operand, letter, sizes, first_batch), value(arg).dtype)


def _leaf(op: Builder, leaf: Leaf, letter: str, sizes: Mapping[str, int], first_batch: int) -> fx.Node:
    """The leaf's part at its index, its dims in the order of the letters."""
    found, letters = leaf.node, list[str]()
    for dim, entry in enumerate(leaf.index):
        name = entry.factors[0][0] if entry.factors else ""
        length = sizes[name] if name else 1
        if value(found).shape[dim] != length:
            found = op(aten.slice.Tensor, found, dim, entry.constant, entry.constant + length, 1)
        letters.append(name)
    wanted = sorted((name for name in letters if name), key=lambda name: _depth(name), reverse=True)
    present = [name for name in letters if name]
    if present != wanted:
        found = op.reshape(found, *(sizes[name] for name in present))
        found = op(aten.permute.default, found, [present.index(name) for name in wanted])
    deepest = max(map(_depth, wanted), default=0)
    lead = [sizes[f"d{n}"] if f"d{n}" in wanted else 1 for n in range(deepest, first_batch - 1, -1)]
    if letter not in wanted:  # the same at each position
        return op(aten.expand.default, op.reshape(found, *lead, 1), [*lead, sizes[letter]])
    return op.reshape(found, *lead, sizes[letter])


def _depth(letter: str) -> int:
    """Where the dim of a letter is, counted from the right; i and j stand for the last one of a vector."""
    return int(letter[1:]) if letter.startswith("d") else 0
