"""Attributes of the objects that are watched, as they are kept: by no code of their classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autopar.ir.same_values import MISSING
from autopar.observation.tables import SHAPED


def value_of(owner: Any, name: str) -> Any:
    """An attribute as it is kept, by no code of its class."""
    try:
        own = attributes(owner)
    except AttributeError:  # of a class with slots
        return _slot(owner, name)
    tables = [own, *(own[key] for key in SHAPED)] if issubclass(type(owner), nn.Module) else [own]
    return next((table[name] for table in tables if name in table), MISSING)


def _slot(owner: Any, name: str) -> Any:
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return MISSING


def attributes(owner: Any) -> Any:
    return object.__getattribute__(owner, "__dict__")


def restore(cls: type, name: str, before: Any) -> None:
    """Put an attribute of a class back."""
    if before is MISSING:
        delattr(cls, name)
    else:
        setattr(cls, name, before)


def holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(holds_tensor(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)
