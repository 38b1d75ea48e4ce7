"""``for expert in hit:`` over the experts that some row chose: traced as the loop over all experts.

    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()        or   for expert in chosen.unique():
    for expert in hit:
        place, token = torch.where(mask[expert].squeeze(0))
        ...

How many experts are hit, and which, is known at run time only. Within the round of an expert each selection of rows is
that of the rows and of "the expert is hit": where it is not, the round selects nothing, and so it adds nothing. (What
a round does beside, :mod:`autopar.selections.empty_selections` refuses.) Where the rows tell that the expert is hit,
:func:`autopar.rules.hits.without_hits` leaves the condition out again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.selections.equal_conditions import conditions_in

MOST_ROUNDS = 512  # a longer one is hardly a list of experts

_NONZERO = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where)
_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)
_MASKED = (torch.masked_select, Tensor.masked_select)
_AS_NUMBER = (Tensor.__index__, Tensor.__int__, Tensor.item)
_COMPARED: dict[Any, Callable[[Any, Any], Any]] = {
    Tensor.eq: operator.eq, Tensor.ne: operator.ne, Tensor.__eq__: operator.eq, Tensor.__ne__: operator.ne,
    torch.eq: operator.eq, torch.ne: operator.ne, Tensor.lt: operator.lt, Tensor.ge: operator.ge,
    Tensor.__lt__: operator.lt, Tensor.__ge__: operator.ge,
}  # fmt: skip
_ALIKE = {"squeeze", "flatten", "view", "reshape", "cpu", "to", "long", "int", "detach", "clone", "contiguous"}
_UNIQUE = (torch.unique, Tensor.unique)
_RANKED = {"topk": 1, "sort": 1, "max": 1, "min": 1}  # they give (values, places)


@dataclass(frozen=True)
class _Hit:
    """A tensor of the experts that are hit, ``experts`` of them at most; ``flag(e)``: whether e is among them."""

    experts: int
    flag: Callable[[int], Tensor]
    shape: tuple[int, ...]  # of one of its elements


class HitLoops(TorchFunctionMode):
    """Within this context, a loop over the experts that are hit goes through all of them, or (``empty``) none."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self._empty = empty
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._hits: dict[int, _Hit] = {}
        self._numbers: dict[int, int] = {}  # of the tensors that a loop gives
        self._bounds: dict[int, int] = {}  # ids are less than that
        self._flag: Tensor | None = None  # of the round that runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if id(first) in self._hits and func in (Tensor.unbind, Tensor.tolist, torch.unbind):
            return _Rounds(self._rounds(self._hits[id(first)], as_number=func is Tensor.tolist))
        if func in _AS_NUMBER and id(first) in self._numbers:
            return self._numbers[id(first)]
        if func in _COMPARED and any(id(one) in self._numbers for one in args):
            left, right = (self._numbers.get(id(one), one) for one in args)
            return _COMPARED[func](left, right)
        if self._flag is not None:
            args = narrowed(func, args, self._flag)
        if func is Tensor.__getitem__:
            args = (args[0], self._plain_index(args[1]))
        if func in _UNIQUE and self._bounds.get(id(first), MOST_ROUNDS) < MOST_ROUNDS:
            result = self._unique(args[0])
        else:
            result = func(*args, **kwargs)
        self._note(func, args, result)
        return result

    # ------------------------------------------------------------ rounds

    def _rounds(self, hit: _Hit, as_number: bool) -> Iterator[Any]:
        for number in () if self._empty else range(hit.experts):
            self._flag = hit.flag(number)
            element = torch.full(hit.shape, number)
            if not as_number:
                self._keep(self._numbers, element, number)
            try:
                yield number if as_number else element
            finally:
                self._flag = None

    def _plain_index(self, index: Any) -> Any:
        """A number, or a slice, in place of the tensor of one expert, where it is the only tensor."""
        if isinstance(index, tuple):
            alone = sum(isinstance(part, Tensor) for part in index) == 1
            return tuple(map(self._plain_index, index)) if alone else index
        if id(index) not in self._numbers:
            return index
        number = self._numbers[id(index)]
        return number if index.dim() == 0 else slice(number, number + 1)

    def _unique(self, ids: Tensor) -> Tensor:
        """The experts that occur among ids with a bound, in their order, which is what ``unique`` gives."""
        count = self._bounds[id(ids)]
        found = (ids.reshape(-1, 1) == torch.arange(count)).any(0).nonzero().squeeze(1)
        self._keep(self._hits, found, _Hit(count, lambda e: (ids == e).any(), ()))
        return found

    # ------------------------------------------------------------ what tensors are

    def _note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = getattr(func, "__name__", "").strip("_")
        first: Any = args[0] if args else None
        if func in _NONZERO and len(args) == 1 and first.dim() == 1 and first.shape[0] <= MOST_ROUNDS:
            for tensor in pytree.tree_leaves(result):
                self._keep(self._hits, tensor, _Hit(first.shape[0], lambda e: first[e] != 0, tuple(tensor.shape[1:])))
        elif name in _RANKED and isinstance(result, tuple):
            self._keep(self._bounds, result[1], first.shape[_dim_of(name, args)])
        elif name == "argmax" and len(args) > 1:
            self._keep(self._bounds, result, first.shape[args[1]])
        elif isinstance(result, Tensor) and result is not first:
            self._inherit(name, args, result)

    def _inherit(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        first = args[0] if args else None
        picked = name == "getitem" and isinstance(args[1], int)
        if name in _ALIKE and id(first) in self._bounds:
            self._keep(self._bounds, result, self._bounds[id(first)])
        if (name in _ALIKE or picked) and id(first) in self._numbers:
            self._keep(self._numbers, result, self._numbers[id(first)])
        column = name == "getitem" and args[1] == (slice(None), 0)
        if (name in _ALIKE or column) and id(first) in self._hits:
            hit = self._hits[id(first)]
            self._keep(self._hits, result, _Hit(hit.experts, hit.flag, tuple(result.shape[1:])))

    def _keep(self, table: dict[int, Any], tensor: Tensor, what: Any) -> None:
        self._alive.append(tensor)
        table[id(tensor)] = what


class _Rounds(list[Any]):
    """What Python loops over in place of the tensors or numbers of a list."""

    def __init__(self, rounds: Iterator[Any]) -> None:
        super().__init__()
        self._rounds = rounds

    def __iter__(self) -> Iterator[Any]:
        return self._rounds


def _dim_of(name: str, args: tuple[Any, ...]) -> int:
    position = 2 if name == "topk" else 1
    return int(args[position]) if len(args) > position and isinstance(args[position], int) else -1


def narrowed(func: Any, args: tuple[Any, ...], flag: Tensor) -> tuple[Any, ...]:
    """The arguments of ``func``, with rows selected only where ``flag`` is true."""
    if func in _NONZERO and len(args) == 1:
        return (torch.logical_and(args[0], flag),)
    if func in _MASKED and len(args) > 1:
        return (args[0], torch.logical_and(args[1], flag))
    if func in _INDEXES and conditions_in(args[1]):
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        index = tuple(torch.logical_and(part, flag) if conditions_in(part) else part for part in parts)
        return (args[0], index if isinstance(args[1], tuple) else index[0], *args[2:])
    return args
