"""Conditions that are written twice (``scores[labels != -100], labels[labels != -100]``), found while a model runs.

``torch.export`` gives the rows that each condition selects a number of their own, and cannot know that two numbers are
equal; it does where both conditions are one tensor. So the second one is replaced by the first, where both are made by
the same calls of the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_COMPARED = {
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isfinite", "isinf", "logical_and", "logical_or", "logical_not",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "and", "or", "invert", "xor", "bool",
    "to", "view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "getitem", "select", "contiguous", "long",
    "any", "all", "detach", "isin", "where", "transpose", "permute", "t",
}  # fmt: skip  # of equal tensors they make equal ones
_IN_PLACE = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
_SELECT = (torch.masked_select, Tensor.masked_select)


def conditions_in(index: Any) -> list[Tensor]:
    """The tensors of booleans in an index ``x[index]``."""
    parts = index if isinstance(index, tuple) else (index,)
    return [part for part in parts if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)]


class EqualConditions(TorchFunctionMode):
    """Within this context, equal conditions of selections are one tensor; ``masked_select`` is an index."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, tuple[Tensor, int]] = {}  # of tensors, by id; the tensor stays alive
        self._written: dict[str, int] = {}
        self._first: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute: torch reads dozens of each tensor in a trace
            return func(*args, **kwargs)
        if func in _SELECT:
            source, mask = args[0], args[1] if len(args) > 1 else kwargs["mask"]
            shape = torch.broadcast_shapes(source.shape, mask.shape)  # type: ignore[no-untyped-call]
            mask = self._condition(mask) if mask.shape == shape else mask.expand(shape)
            return source.expand(shape)[mask]
        if func in (Tensor.__getitem__, Tensor.__setitem__) and conditions_in(args[1]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(self._condition(part) if conditions_in(part) else part for part in parts)
            args = (args[0], index if isinstance(args[1], tuple) else index[0], *args[2:])
        result = func(*args, **kwargs)
        if _writes(func, kwargs):
            self._numbers.clear()  # a view of what was written may be among them
        elif isinstance(result, Tensor) and not result.is_floating_point() and _name(func) in _COMPARED:
            text = f"{_name(func)} {pytree.tree_map(self._known, (args, kwargs))}"
            self._numbers[id(result)] = result, self._number(text)
        return result

    def _condition(self, condition: Tensor) -> Tensor:
        """The first one that is made in the same way."""
        if id(condition) not in self._numbers:
            return condition
        return self._first.setdefault(self._numbers[id(condition)][1], condition)

    def _known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._numbers:
            self._numbers[id(leaf)] = leaf, self._number(f"tensor {len(self._written)}")
        return f"#{self._numbers[id(leaf)][1]}"

    def _number(self, text: str) -> int:
        return self._written.setdefault(text, len(self._written))


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "").strip("_")


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    return in_place or "out" in kwargs or bool(kwargs.get("inplace"))
