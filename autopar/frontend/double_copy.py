"""A copy of a model in float64: with the tensors that are plain attributes, and functions that close over its parts.

``copy.deepcopy`` shares functions, so a lambda made in ``__init__`` would still call the original's children, and
``Module.double`` knows parameters and buffers only.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from autopar.errors import TraceError

Memo = dict[int, Any]


def double_copy(model: nn.Module) -> nn.Module:
    """Raises TraceError for a model that cannot be copied."""
    memo: Memo = {}
    _copy_values_of_forward(model, memo)
    try:
        found: nn.Module = copy.deepcopy(model, memo)
    except TypeError as problem:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {problem}\n"
            "Way out: make what cannot be copied at its first use, or give its class a __deepcopy__."
        ) from None
    known: Memo = {}
    while len(known) < len(memo):  # what a function closes over is copied too, and may have further functions
        fresh = {key: value for key, value in memo.items() if key not in known and key != id(memo)}
        known |= {**fresh, id(memo): None}
        for value in fresh.values():
            _rebind(value, memo)
    for value in [value for key, value in memo.items() if key != id(memo)]:
        if isinstance(value, Tensor) and value.is_floating_point():
            value.data = value.data.double()
    return found.double()


def _copy_values_of_forward(model: nn.Module, memo: Memo) -> None:
    """Enter copies of tensors that some forward has left in attributes: deepcopy refuses those of a graph."""
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()


def _rebind(holder: Any, memo: Memo) -> None:
    """Let the functions in ``holder``, a copy, close over copies."""
    if isinstance(holder, types.FunctionType | type | types.ModuleType):
        return
    for key, value, put in _entries(holder):
        if isinstance(value, types.FunctionType) and value.__closure__:
            put(key, _closed_over_copies(value, memo))


def _entries(holder: Any) -> Iterator[tuple[Any, Any, Callable[[Any, Any], None]]]:
    if isinstance(holder, dict):
        yield from ((key, value, holder.__setitem__) for key, value in list(holder.items()))
    elif isinstance(holder, list):
        yield from ((key, value, holder.__setitem__) for key, value in enumerate(holder))
    attributes = getattr(holder, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((key, value, attributes.__setitem__) for key, value in list(attributes.items()))


def _closed_over_copies(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    if id(function) in memo:
        copied: types.FunctionType = memo[id(function)]
        return copied
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    memo[id(function)] = made  # before its cells: it may close over itself
    for cell, original in zip(cells, function.__closure__ or ()):
        try:
            value = original.cell_contents
        except ValueError:  # not bound yet
            continue
        inner = isinstance(value, types.FunctionType) and value.__closure__
        cell.cell_contents = _closed_over_copies(value, memo) if inner else _copied(value, memo)
    return made


def _copied(value: Any, memo: Memo) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except TypeError:  # a Python module, a lock, a file: none of the model's parts
        return value
