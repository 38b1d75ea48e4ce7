"""What holds names, as tables that are asked by name: attributes of an object, those in slots, a variable around."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

from autopar.frontend.code_names import is_users_class


def own_names(owner: Any) -> dict[str, Any]:
    """The attributes of an object, by no code of its class; none for one with slots."""
    try:
        own = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


class Cell:
    """The variable of an enclosing function, as a table with one name."""

    def __init__(self, cell: CellType) -> None:
        self.of = cell

    def __getitem__(self, key: str) -> Any:
        return getattr(self.of, key)


class Slots:
    """The attributes of an object whose class has slots, as a table."""

    def __init__(self, owner: Any) -> None:
        self.of = owner

    def __getitem__(self, key: str) -> Any:
        return object.__getattribute__(self.of, key)


def is_empty(cell: CellType) -> bool:
    return not hasattr(cell, "cell_contents")


def superclasses_of(function: FunctionType) -> list[type]:
    """The classes of users to which ``super()`` may go in a method."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    own = cells.get("__class__")
    return [cls for cls in own.cell_contents.__mro__[1:] if is_users_class(cls)] if own is not None else []
