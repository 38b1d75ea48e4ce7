"""The look-up of our own operators by name, for printing and reading programs, and those in torch's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

REGISTRY: dict[str, Callable[..., Any]] = {}
COMPOSITES: set[Callable[..., Any]] = set()


def operator(function: _F) -> _F:
    """Register ``function`` under its name; the text form calls it ``op.<name>``."""
    assert function.__name__ not in REGISTRY, function.__name__
    REGISTRY[function.__name__] = function
    return function


def composite(function: _F) -> _F:
    """Register an operator that is written out, as the operators that it calls, in the graphs that ranks run."""
    COMPOSITES.add(function)
    return operator(function)


def library(*schemas: str) -> torch.library.Library:
    """A part of torch's registry with the operators ``autopar::...`` of ``schemas``; they exist as long as it."""
    found = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in schemas:
        found.define(schema)  # type: ignore[no-untyped-call]
    return found
