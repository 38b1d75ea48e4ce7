"""The look-up of our own operators by name, used when a program is printed and read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

REGISTRY: dict[str, Callable[..., Any]] = {}


def operator(function: _F) -> _F:
    """Register ``function`` under its name; the text form calls it ``op.<name>``."""
    assert function.__name__ not in REGISTRY, function.__name__
    REGISTRY[function.__name__] = function
    return function
