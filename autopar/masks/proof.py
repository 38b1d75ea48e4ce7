"""The check of a recognised mask: its graph, evaluated at some elements, against its formula there.

Nothing is taken from the recogniser: the graph is followed with numbers as indices, operators are run by torch, and the
leaves hold random numbers. Small masks are compared as a whole, large ones around the positions where terms change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.canonical_views import argument
from autopar.ir.evaluate import FILLED
from autopar.ir.node import value
from autopar.ir.operator_facts import is_pointwise
from autopar.masks.arithmetic import HIDDEN
from autopar.operators.predicates import Before, Bound, Chunk, Formula, Within

aten = torch.ops.aten

WHOLE = 2**20  # elements that are all compared
RESHAPES = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim)

Coordinates = tuple[Tensor, ...]  # one int64 tensor for each dim, broadcast against each other


class Elements:
    """Elements of nodes. ``leaves``: nodes with random values; so have inputs. ``constants``: tensors of a program.

    ``drawn``: integers are below it; where it is negative, they count up to that number again and again.
    """

    def __init__(self, constants: Mapping[fx.Node, Tensor], leaves: Sequence[fx.Node], drawn: int) -> None:
        self._random, self._most = torch.Generator().manual_seed(0), drawn
        self._whole: dict[fx.Node, Any] = dict(constants)
        for node in leaves:
            if node not in self._whole:
                self._whole[node] = self._drawn(node)

    def _drawn(self, node: fx.Node) -> Tensor:
        kind = value(node)
        if kind.dtype.is_floating_point:
            return torch.randn(kind.shape, dtype=torch.float64, generator=self._random).to(kind.dtype)
        most = 2 if kind.dtype is torch.bool else self._most
        found = torch.randint(0, abs(most), kind.shape, generator=self._random)
        if most < 0 and kind.shape:
            found = (found[..., :1] + torch.arange(kind.shape[-1])) % -most
        return found.to(kind.dtype)

    def whole(self, node: fx.Node) -> Any:
        """All elements of a node."""
        if node not in self._whole:
            if node.op == "placeholder":
                self._whole[node] = self._drawn(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.whole)
                self._whole[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._whole[node]

    def at(self, node: fx.Node, where: Coordinates) -> Tensor:
        """The elements of ``node`` at some coordinates."""
        if node in self._whole or node.op == "placeholder":
            found: Tensor = self.whole(node)
            return found[where] if where else found
        if node.target in FILLED:
            return torch.tensor(FILLED[node.target](node), dtype=value(node).dtype)
        if node.target in RESHAPES:
            return self.at(*_reshaped(node, where))
        if is_pointwise(node.target):
            shape = value(node).shape
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda arg: self.at(arg, _aligned(where, len(shape), value(arg).shape))
            )
            return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]
        source = node.args[0] if node.args else None
        step = getattr(self, f"_{node.target.overloadpacket.__name__}", None)  # type: ignore[union-attr]
        if step is None or not isinstance(source, fx.Node):
            return self.whole(node)[where]  # type: ignore[no-any-return]
        return step(node, source, where)  # type: ignore[no-any-return]

    def _expand(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        return self.at(source, _aligned(where, len(value(node).shape), value(source).shape))

    def _permute(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        dims = [int(dim) % len(where) for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
        return self.at(source, tuple(where[dims.index(dim)] for dim in range(len(where))))

    def _transpose(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        dims = list(range(len(where)))
        a, b = (int(dim) % len(where) for dim in node.args[1:3])  # type: ignore[arg-type]
        dims[a], dims[b] = b, a
        return self.at(source, tuple(where[dim] for dim in dims))

    def _slice(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        dim, size = argument(node, 1, "dim", 0) % len(where), 0
        size = value(source).shape[dim]
        positions = torch.arange(size)[argument(node, 2, "start", None) :: argument(node, 4, "step", 1)]
        return self.at(source, (*where[:dim], positions[where[dim]], *where[dim + 1 :]))

    def _select(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        shape = value(source).shape
        dim, position = (int(x) for x in node.args[1:3])  # type: ignore[arg-type]
        dim %= len(shape)
        return self.at(source, (*where[:dim], torch.tensor(position % shape[dim]), *where[dim:]))

    def _index_select(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        dim = int(node.args[1]) % len(where)  # type: ignore[arg-type]
        picks = self.at(node.args[2], (where[dim],))  # type: ignore[arg-type]
        return self.at(source, (*where[:dim], picks, *where[dim + 1 :]))

    def _gather(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        dim = int(node.args[1]) % len(where)  # type: ignore[arg-type]
        return self.at(source, (*where[:dim], self.at(node.args[2], where), *where[dim + 1 :]))  # type: ignore[arg-type]

    def _tril(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        inside = where[-1] <= where[-2] + _diagonal(node)
        return torch.where(inside, self.at(source, where), torch.zeros((), dtype=value(node).dtype))

    def _triu(self, node: fx.Node, source: fx.Node, where: Coordinates) -> Tensor:
        inside = where[-1] >= where[-2] + _diagonal(node)
        return torch.where(inside, self.at(source, where), torch.zeros((), dtype=value(node).dtype))


def _diagonal(node: fx.Node) -> int:
    return int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]


def _aligned(where: Coordinates, dims: int, shape: Sequence[int]) -> Coordinates:
    zero = torch.zeros((), dtype=torch.int64)
    return tuple(at if size != 1 else zero for at, size in zip(where[dims - len(shape) :], shape))


def _reshaped(node: fx.Node, where: Coordinates) -> tuple[fx.Node, Coordinates]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    linear = torch.zeros((), dtype=torch.int64)
    for at, size in zip(where, value(node).shape):
        linear = linear * size + at
    found = []
    for size in reversed(value(source).shape):
        found.append(linear % size)
        linear = linear // size
    return source, tuple(reversed(found))


# ---------------------------------------------------------------- the comparison


def agrees(
    mask: fx.Node,
    formula: Formula,
    vectors: Sequence[fx.Node],
    bias: fx.Node | None,
    leaves: Sequence[fx.Node],
    constants: Mapping[fx.Node, Tensor],
    lengths: tuple[int, int],
) -> bool:
    """Whether ``mask`` is ``formula`` over its ``vectors``, and the ``bias`` where that holds.

    ``lengths``: rows and columns of the scores. ``leaves``: nodes whose values do not matter.
    """
    shape = value(mask).shape
    rows, columns = _sampled(formula, lengths, math.prod(shape[:-2]) * math.prod(lengths))
    batch = [torch.tensor(sorted({0, 1, size - 1} & set(range(size)))) for size in shape[:-2]]
    for drawn in (3, max(lengths), -5):
        elements = Elements(constants, leaves, drawn)
        grid = torch.meshgrid(
            *batch,
            rows % shape[-2],
            columns % shape[-1],
            indexing="ij",
        )
        found = elements.at(mask, tuple(grid)).expand(grid[0].shape)
        whole = [_of_batch(elements.whole(vector), batch, vector) for vector in vectors]
        shown = formula.evaluate(rows, columns, whole)
        if shown.dim() > 2 and len(shape) > 3:
            shown = shown.unsqueeze(-3)
        shown = shown.expand(found.shape)
        if found.dtype is torch.bool:
            if not torch.equal(found, shown):
                return False
            continue
        kept = (
            torch.zeros((), dtype=found.dtype)
            if bias is None
            else elements.at(bias, _aligned(tuple(grid), len(shape), value(bias).shape))
        )
        if not bool(torch.where(shown, found == kept, found <= HIDDEN).all()):
            return False
    return True


def _of_batch(vector: Tensor, batch: Sequence[Tensor], node: fx.Node) -> Tensor:
    """The sampled rows of the batch. The batch dims of a mask are those before its heads."""
    outer = batch[:-1] if len(batch) > 1 else batch
    for dim, rows in zip(range(vector.dim() - 2, -1, -1), reversed(outer)):
        if vector.shape[dim] > 1:
            vector = vector.index_select(dim, rows)
    return vector


def _sampled(formula: Formula, lengths: tuple[int, int], elements: int) -> tuple[Tensor, Tensor]:
    if elements <= WHOLE:
        return torch.arange(lengths[0]), torch.arange(lengths[1])
    distances = {0}
    for term in formula.terms:
        match term:
            case Before(number) | Within(number) | Bound(_, number):
                distances |= {number, -number}
            case Chunk(size):
                distances |= {size, -size, 2 * size}
    found = []
    for length in lengths:
        bases = {0, length // 3, length // 2, length - 1, *distances}
        near = {b + d + e for b, d, e in itertools.product(bases, distances, (-2, -1, 0, 1, 2))}
        found.append(torch.tensor(sorted(near & set(range(length)))))
    return found[0], found[1]
