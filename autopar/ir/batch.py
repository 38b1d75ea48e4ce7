"""Which dims of the inputs are the batch and the sequence, and into how many parts ranks split them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.ir.collectives import TARGETS
from autopar.ir.node import Node, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import DATA_AXES, SEQUENCE, Mesh
from autopar.plan import Plan

PADDED_ROWS = "padded_rows"  # how constants are called that say which row each row of a padded batch is,
REAL_ROWS = "real_rows"  # and which of these are no copies


@dataclass(frozen=True)
class InputDims:
    """The batch dim and the sequence dim of an input; None where it has none."""

    batch: int | None
    sequence: int | None

    def parts(self, mesh: Mesh) -> dict[int, int]:
        """Dim -> the number of parts in which the ranks have it."""
        found: dict[int, int] = {}
        for dim, ways in ((self.batch, data_ways(mesh)), (self.sequence, mesh.size(SEQUENCE))):
            if dim is not None:
                found[dim] = found.get(dim, 1) * ways
        return found


def input_dims(tensors: Sequence[tuple[str, Tensor]], plan: Plan) -> list[InputDims]:
    """The dims of each input (name, tensor) that ranks have in parts, as the plan says or by the usual guess."""
    batch = batch_dims([(name, tensor.shape) for name, tensor in tensors], plan.batch_dims)
    kinds = [(name, tensor.shape, tensor.is_floating_point()) for name, tensor in tensors]
    return list(map(InputDims, batch, sequence_dims(kinds, plan.sequence_dims)))


def data_ways(mesh: Mesh) -> int:
    """The number of parts into which the batch is split over ranks."""
    ways = 1
    for axis in DATA_AXES:
        ways *= mesh.size(axis)
    return ways


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the batch is split, in the order in which they split it."""
    return tuple(axis for axis in DATA_AXES if mesh.size(axis) > 1)


def batch_dims(shapes: Sequence[tuple[str, Sequence[int]]], given: Mapping[str, int | None]) -> list[int | None]:
    """The batch dim of each input (name, shape); None for an input without one.

    It is the ``given`` one, else dim 0 if that is as long as the dim 0 of most other inputs. Raises ValueError for a
    given one that the input does not have.
    """
    for name, shape in shapes:
        dim = given.get(name)
        if dim is not None and not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"Plan(batch_dims={{{name!r}: {dim}}}): the input has {len(shape)} dims\n"
                f"Way out: one from 0 to {len(shape) - 1}, or None: it has no batch dim."
            )
    lengths = Counter(shape[0] for name, shape in shapes if len(shape) and name not in given)
    usual = lengths.most_common(1)[0][0] if lengths else None
    return [given[name] if name in given else 0 if len(shape) and shape[0] == usual else None for name, shape in shapes]


def rows_of(program: Program) -> int | None:
    """The rows of the batch that a program takes; None where no input has any."""
    nodes = (node for node, _ in program.placeholders(InputKind.INPUT))
    return next((value(node).shape[dim] for node, dim in zip(nodes, _batch_dims_of(program)) if dim is not None), None)


def input_rows(program: Program) -> dict[Node, int]:
    """The inputs that have rows of the batch -> their batch dim."""
    nodes = [node for node, _ in program.placeholders(InputKind.INPUT)]
    return {node: dim for node, dim in zip(nodes, _batch_dims_of(program)) if dim is not None}


def common_rows(program: Program) -> int:
    """The rows of the batch; where inputs have several numbers of them, a number that divides all. 0: none has any."""
    return math.gcd(*(value(node).shape[dim] for node, dim in input_rows(program).items()))


def is_padded(program: Program) -> bool:
    """Whether the data axes do not divide the rows, which need copies behind them then."""
    return common_rows(program) % data_ways(program.mesh) != 0


def pads_rows(program: Program) -> Iterator[tuple[Node, int]]:
    """The nodes that put copies of rows behind a batch, each with its dim of rows."""
    constants = program.placeholders(InputKind.CONSTANT)
    indices = {node for node, entry in constants if entry.target.startswith(PADDED_ROWS)}
    for node in program.graph.nodes:
        if node.target in TARGETS and node.args[0] in indices:  # the part of an axis that is split already
            indices.add(node)
        elif node.target is torch.ops.aten.index_select.default and node.args[2] in indices:
            yield node, int(node.args[1])


def _batch_dims_of(program: Program) -> list[int | None]:
    """Of each input of a program, whole."""
    shapes = [(entry.target, value(node).shape) for node, entry in program.placeholders(InputKind.INPUT)]
    return batch_dims(shapes, program.plan.batch_dims)


def batches_of_rows(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call that ``program`` was traced with, with another number of rows: the first ones again."""
    dims = iter(_batch_dims_of(program))
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    static = {position for position, _ in program.static_inputs}
    for position, leaf in enumerate(leaves):
        dim = next(dims) if position not in static else None
        if dim is not None:
            leaves[position] = of_rows(leaf, dim, rows)
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return found


def of_rows(tensor: Tensor, dim: int, rows: int) -> Tensor:
    """``tensor`` with another number of rows in ``dim``: the first ones again."""
    return tensor.detach().index_select(dim, torch.arange(rows, device=tensor.device) % tensor.shape[dim])


def sequence_dims(
    tensors: Sequence[tuple[str, Sequence[int], bool]], given: Mapping[str, int | None]
) -> list[int | None]:
    """The sequence dim of each input (name, shape, whether it is floating); None for an input without one.

    It is the ``given`` one, else dim 1 of whole numbers (batch, positions) and floats (batch, positions, width).
    """
    return [
        given[name] if name in given else 1 if len(shape) == (3 if floating else 2) and shape[1] > 1 else None
        for name, shape, floating in tensors
    ]
