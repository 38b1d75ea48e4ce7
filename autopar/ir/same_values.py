"""Python values that a graph may depend on: whether two are the same to it, and how they look in a message."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor


class _Missing:
    """In place of a value that there is not."""

    def __repr__(self) -> str:
        return "missing"


MISSING: Final = _Missing()
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def is_plain(value: Any) -> bool:
    """Whether ``value`` can only be replaced, not changed, and can be compared."""
    return isinstance(value, PLAIN) or (isinstance(value, (tuple, frozenset)) and all(map(is_plain, value)))


def is_same(before: Any, now: Any) -> bool:
    """Whether a graph that was traced with one serves the other: the same object, or a plain value that is equal."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, PLAIN):
        return repr(before) == repr(now)  # 0.0 is not -0.0, and nan is nan
    if isinstance(before, (tuple, frozenset)):
        return len(before) == len(now) and all(map(is_same, before, now))
    if hasattr(before, "__func__") and hasattr(before, "__self__"):  # a bound method is made each time it is read
        return before.__func__ is now.__func__ and before.__self__ is now.__self__
    return False


def shown(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (*PLAIN, list, tuple, dict, _Missing)):
        text = repr(value)
    else:
        text = getattr(value, "__name__", f"a {type(value).__name__}")
    return text if len(text) <= 60 else text[:57] + "..."
