"""Modules and classes that code holds as values: ``self.config.SCALE`` of a class, ``settings`` under another name.

Nobody is told when an attribute of a module or of a class is read. Of one that forward has met, all is taken for read
that its functions name as an attribute of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import getmro
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from autopar.observation.code_names import is_users, is_users_class
from autopar.observation.tables import SHAPED, own_names

# where somebody may put another function in place of torch's own: F.scaled_dot_product_attention = ...
OF_TORCH = (vars(torch), vars(torch.nn.functional))
Space = Any  # a module, a class, or an object of which nobody saw what was read


class Spaces:
    """Those that were met, and the names in the functions that were followed.

    ``read``: reads attributes of one of them, which may meet others and follow more functions.
    """

    def __init__(self, read: Callable[[Space, Iterable[str]], None]) -> None:
        self._read = read
        self._met: dict[int, tuple[str, Space, int]] = {}  # its place, and how many names were looked for in it
        self._names: dict[str, None] = {}

    def meet(self, value: Space) -> None:
        """``value`` is at hand."""
        if id(value) in self._met:
            return
        if is_users(value.__name__) if isinstance(value, ModuleType) else is_users_class(_class_of(value)):
            self._met[id(value)] = _place_of(value), value, 0

    def classes(self) -> list[type]:
        """Those that were met."""
        return [space for _, (_, space, _) in self._in_order() if isinstance(space, type)]

    def name(self, names: Iterable[str]) -> None:
        """A function reads attributes of these ``names``, which are sorted, of whatever it is."""
        self._names.update(dict.fromkeys(names))

    def settle(self) -> None:
        """Read what is named of what was met."""
        is_settled = False
        while not is_settled:
            is_settled, names = True, list(self._names)
            for key, (place, space, looked_at) in self._in_order():
                if looked_at < len(names):
                    self._met[key], is_settled = (place, space, len(names)), False
                    self._read(space, names[looked_at:])

    def _in_order(self) -> list[tuple[int, tuple[str, Space, int]]]:
        return sorted(self._met.items(), key=lambda item: item[1][0])


def space_of(value: Any, name: str, class_of: Callable[[type], Mapping[str, Any]]) -> Any:
    """The table in which ``value``, a module, a class or a function, has the attribute ``name``, if it has it.

    ``class_of``: gives the table of a class.
    """
    if isinstance(value, type):
        bases = (*value.__mro__, *getmro(type(value)))
        cls = next((base for base in bases if name in vars(base)), None)
        return class_of(cls) if cls is not None and is_users_class(cls) else None
    is_followed = isinstance(value, ModuleType) or isinstance(value, FunctionType) and is_users(value.__module__)
    return vars(value) if is_followed and name in vars(value) else None


def up_to_users(bases: Sequence[type]) -> Sequence[type]:
    """Those of ``bases`` up to the last class of users: a name that stands only behind it is nobody's of users."""
    count = next((number for number in range(len(bases), 0, -1) if is_users_class(bases[number - 1])), 0)
    return bases[:count]


def attributes_named(owner: Any, names: Iterable[str]) -> Iterator[str]:
    """Those of ``names`` that an object has, of its own or by its class."""
    own = own_names(owner)
    tables = [own, *(own[name] for name in SHAPED)] if isinstance(owner, nn.Module) else [own]
    tables += [vars(base) for base in type(owner).__mro__ if is_users_class(base)]
    for name in names:
        for table in tables:
            if name in table:
                yield name
                break


def _place_of(space: Space) -> str:
    """Of classes that come out of a set, in another order in each process; others stay as they were met."""
    return f"{space.__module__}.{space.__qualname__}" if isinstance(space, type) else ""


def _class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)
