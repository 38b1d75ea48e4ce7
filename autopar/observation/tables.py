"""What holds names, as tables that are asked by name: attributes of an object, those in slots, a variable around."""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Any

from torch import nn

from autopar.ir.guards import Contents
from autopar.observation.code_names import is_users_class
from autopar.observation.source_lines import is_users_file

SHAPED = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
A_HOOK = "a hook of"
# how torch keeps a module
OWN = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"} - {"training", "_modules", *HOOKS}


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

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self.of, key, value)


class Slots:
    """The attributes of an object whose class has slots, as a table."""

    def __init__(self, owner: Any) -> None:
        self.of = owner

    def __getitem__(self, key: str) -> Any:
        return object.__getattribute__(self.of, key)

    def __setitem__(self, key: str, value: Any) -> None:
        object.__setattr__(self.of, key, value)

    def has(self, key: str) -> bool:
        """Whether the slot has a value."""
        try:
            self[key]
        except AttributeError:
            return False
        return True


class OfClass:
    """The attributes of a class, beside those that Python gives it, as a table that may be written."""

    def __init__(self, cls: type) -> None:
        self.of = cls

    def names(self) -> dict[str, Any]:
        """All of them, with their values."""
        return {name: value for name, value in vars(self.of).items() if name[:2] != "__"}

    def get(self, key: str, otherwise: Any = None) -> Any:
        return vars(self.of).get(key, otherwise)

    def __setitem__(self, key: str, value: Any) -> None:
        type.__setattr__(self.of, key, value)

    def pop(self, key: str, otherwise: Any = None) -> None:
        if key in vars(self.of):
            type.__delattr__(self.of, key)


def reads_all(name: str, file: str) -> bool:
    """Whether code in ``file`` that reads the attribute ``name`` of an object sees all: ``vars(x)``, ``copy(x)``."""
    return name in _OF_ALL and (file == copy.__file__ or is_users_file(file))


_OF_ALL = ("__dict__", "__getstate__", "__reduce_ex__")


def is_empty(cell: CellType) -> bool:
    return not hasattr(cell, "cell_contents")


def superclasses_of(function: FunctionType) -> list[type]:
    """The classes of users to which ``super()`` may go in a method."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    own = cells.get("__class__")
    return [cls for cls in own.cell_contents.__mro__[1:] if is_users_class(cls)] if own is not None else []


def is_of_hooks(contents: Contents) -> bool:
    """Whether these are hooks of a module, by numbers that are counted in each process."""
    return contents.label.startswith(A_HOOK)
