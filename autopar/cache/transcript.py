"""What a model and its process answer, as one digest: whether all is as it was, in a fifth of the time of a table.

The values are written one after the other, with what each consists of (:mod:`autopar.cache.value_digests`), by the
pickler of Python's library, which goes through containers and plain values in C. Nothing is ever read back. Values that
differ give other bytes; equal ones may too, if one process has two equal lists where the other has one twice: then the
table is made, and says whether they are equal (:mod:`autopar.cache.state`).
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Container
from types import FunctionType
from typing import Any

from autopar.cache.code_digests import DIGITS, code_digest
from autopar.cache.reasons import Unstorable
from autopar.cache.value_digests import Digests, form_of, is_code_of_users
from autopar.ir.same_values import PLAIN

_OF_PICKLE = frozenset((bool, int, float, str, bytes, type(None), tuple))  # which it tells apart
_PRINTED = frozenset(PLAIN) - _OF_PICKLE


class _Parts(Digests):
    """What values consist of, one level deep. ``followed``: the functions of which all counts, by name."""

    def __init__(self, address: Callable[[Any], str | None], followed: Container[str]) -> None:
        super().__init__(address)
        self._found_at, self._followed = address, followed
        self._of_modules: set[type] = set()

    def cls(self, cls: type) -> Any:
        """As :meth:`Digests.cls`; of a module's class, methods that neither ran nor were read by any name are known by
        where they stand: nothing depends on the rest. What other functions compute may have been computed before.
        """
        found = super().cls(cls)
        return tuple(map(self._placed, found)) if cls in self._of_modules else found

    def _class_of_module(self, cls: type) -> Any:
        self._of_modules.update(cls.__mro__)
        return super()._class_of_module(cls)

    def _placed(self, part: Any) -> Any:
        if type(part) is not FunctionType or not is_code_of_users(part):
            return part
        where = f"{part.__module__}.{part.__qualname__}"
        return part if where in self._followed else f"function {where} {part.__code__.co_firstlineno}"

    def _meet(self, function: FunctionType) -> None:
        self.functions.append(function)  # who asks for the code makes a table

    def of(self, value: Any) -> Any:
        return value

    def leniently(self, value: Any) -> Any:
        return value

    def join(self, *parts: Any) -> Any:
        return parts

    def in_order(self, container: Any) -> list[Any]:
        by_name = {_name_of(item): item for item in container}
        if "" not in by_name and len(by_name) == len(container):
            return [by_name[name] for name in sorted(by_name)]
        digests = Digests(self._found_at)
        found = digests.in_order(container)
        self.code.update(digests.code)  # in an order that is another in each process
        self.functions.extend(sorted(digests.functions, key=lambda one: (_name_of(one), code_digest(one.__code__))))
        return found


def _name_of(item: Any) -> str:
    """Equal ones in every process, and most often another for each item of a set; empty for what has none."""
    if type(item) in PLAIN:
        return f"{type(item).__name__} {item!r}"
    return f"{item.__module__}.{item.__qualname__}" if isinstance(item, (type, FunctionType)) else ""


class Transcript(pickle.Pickler):
    """``address``: as :class:`Digests` takes it.

    ``followed``: the functions that ran, or whose names were followed, as ``module.qualified_name``. Of others, such as
    the methods of a class that nobody names, neither the code nor what it holds can change the trace.
    """

    def __init__(self, address: Callable[[Any], str | None], followed: Container[str]) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=5)
        self.fast = True  # whether two equal texts are one object is another matter in each process
        self.parts = _Parts(address, followed)
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is used twice

    def persistent_id(self, value: Any) -> Any:
        """What stands for a value: nothing for what the pickler knows, a number for one that was there, or its parts.

        This is asked of every value, so that nothing is ever pickled as its class says.
        """
        kind = type(value)
        if kind in _OF_PICKLE:
            return None
        number = self._numbers.get(id(value))
        if number is not None:
            return number
        if kind in _PRINTED:
            return f"{kind.__name__} {value!r}"
        self._numbers[id(value)] = len(self._alive)
        self._alive.append(value)
        if kind is list or kind is dict:
            return value  # itself, which is not asked about again
        try:
            return form_of(value, kind)(self.parts, value)
        except Unstorable:
            return "some", f"{kind.__module__}.{kind.__qualname__}"

    def digest(self) -> str:
        """Of all that was written."""
        return hashlib.sha256(self._stream.getbuffer()).hexdigest()[:DIGITS]
