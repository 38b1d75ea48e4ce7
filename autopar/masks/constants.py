"""Constants in a mask's graph: what they hold, as a value or a formula, where it is one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from autopar.ir.evaluate import compact
from autopar.ir.node import value, values
from autopar.ir.operator_facts import is_pure
from autopar.masks.indices import Index
from autopar.masks.values import ZERO, Affine, Choice, Number, Quotient, Value
from autopar.operators.predicates import Before, Bound, Chunk, Clause, Formula, Letter, Within

LARGEST = 2**26  # elements of a tensor that is evaluated to be recognised


class Constants:
    """The tensors of a program that follow from its constants alone, evaluated when they are asked for."""

    def __init__(self, constants: Mapping[fx.Node, Tensor]) -> None:
        self._tensors: dict[fx.Node, Tensor | None] = dict(constants)

    def of(self, node: fx.Node, index: Index, sizes: Mapping[str, int]) -> Value | None:
        """A number, a sum of letters or a formula; None where the node is no constant, or none of these."""
        tensor = self.tensor(node)
        if tensor is None:
            return None
        tensor = compact(tensor)
        entries = [entry if size > 1 else ZERO for entry, size in zip(index, tensor.shape)]
        letters = {letter for entry in entries for letter, _ in entry.factors}
        if not letters <= {"i", "j"}:
            return None
        ranges = {"i": torch.arange(sizes["i"])[:, None], "j": torch.arange(sizes["j"])[None]}
        at = [
            sum((ranges[letter] * f for letter, f in entry.factors), torch.tensor([[entry.constant]]))
            for entry in entries
        ]
        grid = compact(tensor[tuple(at)] if at else tensor.reshape(1, 1))
        return _fitted(grid)

    def tensor(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on no input and is not too large."""
        if node not in self._tensors:
            self._tensors[node] = None
            if node.op == "call_function" and is_pure(node.target) and len(values(node)) == 1:
                self._tensors[node] = self._computed(node)
        return self._tensors[node]

    def _computed(self, node: fx.Node) -> Tensor | None:
        if math.prod(value(node).shape) > LARGEST:
            return None
        tensors = {source: self.tensor(source) for source in node.all_input_nodes}
        if any(tensor is None for tensor in tensors.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: tensors[source])  # type: ignore[arg-type, return-value]
        found = node.target(*args, **kwargs)  # type: ignore[operator]
        return found if isinstance(found, Tensor) else None


def _fitted(grid: Tensor) -> Value | None:
    """What a grid (rows or 1, columns or 1) holds."""
    if grid.numel() == 1:
        return Number(grid.item())
    if grid.shape[0] == 1:
        return _fitted_line(grid[0], "j")
    return _fitted_line(grid[:, 0], "i") if grid.shape[1] == 1 else _fitted_square(grid)


def _fitted_line(line: Tensor, letter: Letter) -> Value | None:
    if line.dtype is torch.int64 and torch.equal(line, torch.arange(len(line)) + line[0]):
        return Affine(((letter, 1),), int(line[0]))
    size = int((line != line[0]).int().argmax()) if line.dtype is torch.int64 else 0
    if size and torch.equal(line, torch.arange(len(line)) // size):
        return Quotient(letter, size)
    if line.dtype is torch.bool:
        changes = (line[1:] != line[:-1]).nonzero().flatten().tolist()
        if len(changes) == 1:
            return Choice(frozenset({frozenset({Bound(letter, changes[0] + 1, bool(line[0]))})}), True, False)
    return None


def _fitted_square(grid: Tensor) -> Value | None:
    """Two numbers, the larger one under a formula that the first and the last positions of its rows suggest."""
    least, most = grid.amin(), grid.amax()
    shown = grid == most
    if not bool((shown | (grid == least)).all()):
        return None
    rows, columns = (torch.arange(size) for size in shown.shape)
    for clauses in _suggested(shown):
        if torch.equal(Formula(clauses).evaluate(rows, columns, ()).expand_as(shown), shown):
            return Choice(frozenset(map(frozenset, clauses)), most.item(), least.item())
    return None


def _suggested(shown: Tensor) -> list[tuple[Clause, ...]]:
    size = shown.shape[1]
    first = shown.int().argmax(1)
    last = size - 1 - shown.flip(1).int().argmax(1)
    rows, some = torch.arange(len(shown)), shown.any(1)
    lower, upper = (some & (first > 0)).nonzero().flatten(), (some & (last < size - 1)).nonzero().flatten()
    width = [int(rows[lower[0]] - first[lower[0]]) + 1] if len(lower) else []
    offset = [int(last[upper[-1]] - rows[upper[-1]])] if len(upper) else []
    found: list[tuple[Clause, ...]] = [((Before(b),),) for b in offset]
    found += [((Within(w),),) for w in width] + [((Before(b),), (Within(w),)) for b in offset for w in width]
    chunk, end = int(first[lower[0]]) if len(lower) else 0, int(last[0]) + 1
    found += [((Chunk(chunk),),), ((Before(),), (Chunk(chunk),))] if chunk else []
    return [*found, ((Before(), Bound("j", end)),)]
