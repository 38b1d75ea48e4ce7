"""Operators whose result has a size that depends on values, written with the size that it has on the example.

A condition in an index becomes the positions of its elements, the first ones of a stable order: of a size that is
known, and operators that any mesh can split. So do ``nonzero``, ``where`` of a condition, ``unique`` and
``repeat_interleave``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.selections.equal_conditions import conditions_in

Count = Callable[[Tensor], int]  # of a tensor of one number, that number on the example

_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)
_PUTS = (Tensor.index_put, Tensor.index_put_, torch.index_put, torch.index_put_)
_NONZERO = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)
_REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)


def depends_on_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the size of what ``func`` gives, or of what it takes, depends on values; of those that are known here."""
    if func in (*_INDEXES, *_PUTS):
        return bool(conditions_in(args[1]))
    if func is torch.where:
        return len(args) + len(kwargs) == 1
    if func in _REPEATS:
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None and repeats.numel() > 1
    return func in _NONZERO or _is_unique(func, args, kwargs)


def with_sizes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], count: Count) -> Any:
    """``func(*args, **kwargs)``, one of those that depend on values, where ``count`` tells how many there are."""
    if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
        flat = args[0].flatten(0, args[1].dim() - 1) if args[1].dim() > 1 else args[0]
        return flat.index_select(0, _places(_mask(args[1]).reshape(-1), count)[0])
    if func in (*_INDEXES, *_PUTS):
        return func(args[0], _index(args[1], count), *args[2:], **kwargs)
    if func is torch.where:
        return _places(_mask(args[0] if args else kwargs["condition"]), count)
    if func in _NONZERO:
        places = _places(_mask(args[0]), count)
        return places if kwargs.get("as_tuple") else torch.stack(places, 1)
    if func in _REPEATS:
        return _repeated(args[0], args[1] if len(args) > 1 else kwargs["repeats"], kwargs.get("dim"), count)
    return _unique(args[0], kwargs, count)


def _mask(condition: Tensor) -> Tensor:
    return condition if condition.dtype == torch.bool else condition != 0


def _places(mask: Tensor, count: Count) -> tuple[Tensor, ...]:
    """The positions of the true elements along each dim, in their order."""
    flat = mask.reshape(-1)
    order = torch.sort(flat.logical_not().to(torch.int64), stable=True).indices
    rest = order[: count(flat.sum())]
    found: list[Tensor] = []
    for size in reversed(mask.shape[1:]):
        found.insert(0, rest % size)
        rest = torch.div(rest, size, rounding_mode="floor")
    return (rest, *found)


def _index(index: Any, count: Count) -> Any:
    """The index with positions in place of conditions."""
    parts: list[Any] = []
    for part in index if isinstance(index, (tuple, list)) else (index,):
        parts += _places(_mask(part), count) if conditions_in(part) else [part]
    return tuple(parts)


def _repeated(source: Tensor, repeats: Tensor, dim: int | None, count: Count) -> Tensor:
    flat = source.reshape(-1) if dim is None else source
    which = torch.arange(count(repeats.sum()), device=repeats.device)
    ends = repeats.cumsum(0)
    return flat.index_select(dim or 0, (which[:, None] >= ends).sum(1))


# ---------------------------------------------------------------- unique


@dataclass(frozen=True)
class _Sorted:
    """A flat tensor in an order in which equal elements stand together, and whether each is the first of its kind."""

    values: Tensor
    first: Tensor
    order: Tensor | None = None


def _is_unique(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    named = getattr(func, "__name__", "") in ("unique", "unique_consecutive")
    return named and bool(args) and isinstance(args[0], Tensor) and kwargs.get("dim") is None


def _unique(source: Tensor, kwargs: Mapping[str, Any], count: Count) -> Any:
    flat = source.reshape(-1)
    found = _sorted(flat) if "sorted" in kwargs else _Sorted(flat, _first(flat))
    (starts,) = _places(found.first, count)
    results = [found.values[starts]]
    if kwargs.get("return_inverse"):
        which = found.first.cumsum(0) - 1
        if found.order is not None:
            which = torch.zeros_like(which).scatter(0, found.order, which)
        results.append(which.reshape(source.shape))
    if kwargs.get("return_counts"):
        results.append(torch.cat([starts[1:], starts.new_tensor([flat.numel()])]) - starts)
    return results[0] if len(results) == 1 else tuple(results)


def _sorted(flat: Tensor) -> _Sorted:
    values, order = torch.sort(flat, stable=True)
    return _Sorted(values, _first(values), order)


def _first(values: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
