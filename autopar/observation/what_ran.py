"""What a run depends on, and nobody saw being read.

An object that forward makes is no attribute of anything, so nothing tells of the methods that are read of it; and
``x()``, ``x * y`` and ``for y in x`` ask the class. But the code that ran is known. What it reads of globals and of
the variables around it counts as that of all other functions.

What did not run counts for nothing, whoever names it: of an object that knows all of a program (a trainer, a logger, a
test's configuration) one would get to all of the program's functions, and all of its objects.

A function that remembers what it gave (``functools.cache``) may have run before, with any object as an argument. Of the
objects that a run meets then all counts that this function names, or one that it may call.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from autopar.ir.same_values import PLAIN
from autopar.observation.code_names import functions_of, is_users, is_users_class, names_of
from autopar.observation.readings import Readings
from autopar.observation.source_lines import is_users_file
from autopar.observation.spaces import attributes_named


def follow_what_ran(readings: Readings, ran: Collection[str]) -> None:
    """Follow the functions that stand at the places ``ran``, in ``readings`` of a run that is over.

    As far as they are methods of classes that were met.
    """
    looked_at, names = set[tuple[type, bool]](), {place.rpartition(" ")[0] for place in ran}
    readings.is_over, idle = True, _Idle(readings, ran)
    remembered = _Remembered(readings, idle)
    while True:
        remembered.follow()
        readings.spread()
        made = [(base, True) for cls in readings.spaces.classes() for base in cls.__mro__]
        owners = [(type(owner), not isinstance(owner, nn.Module)) for owner in readings.guards.owners]
        known = [(base, is_object) for cls, is_object in owners for base in cls.__mro__]
        new = [kind for kind in dict.fromkeys((*made, *known)) if kind not in looked_at]
        if not new:
            return
        looked_at.update(new)
        for cls, is_whole in new:
            for function in _methods(cls, "" if is_whole else "__"):
                if function.__code__.co_qualname in names and place_of(function.__code__) in ran:
                    readings.function(function)


def places_of(ran: Iterable[CodeType]) -> frozenset[str]:
    """:func:`place_of` what is users'."""
    return frozenset(map(place_of, filter(is_users_code, ran)))


def place_of(code: CodeType) -> str:
    """The same in every process, and most often another one for each function."""
    return f"{code.co_qualname} {os.path.basename(code.co_filename)}:{code.co_firstlineno}"


class _Idle:
    """The users' functions that did not run, which ``readings`` of a run that is over leave out."""

    def __init__(self, readings: Readings, ran: Collection[str]) -> None:
        self._readings, self._ran, self._left_out = readings, ran, list[FunctionType]()
        if ran:  # else nobody looked: a profiler of the user's was at work
            readings.may_have_run = self._has_run

    def _has_run(self, function: FunctionType) -> bool:
        has_run = not is_users_code(function.__code__) or place_of(function.__code__) in self._ran
        self._left_out += [] if has_run else [function]
        return has_run

    def follow(self) -> None:
        """They have run before."""
        self._readings.may_have_run = lambda function: True
        while self._left_out:
            self._readings.function(self._left_out.pop())


class _Remembered:
    """Follows what functions that remember may have read, in ``readings`` of a run that is over."""

    def __init__(self, readings: Readings, idle: _Idle) -> None:
        self._readings, self._idle, self._looked_at = readings, idle, 0
        self._done, self._names = set[int](), set[str]()
        self._owners = [owner for owner, _ in readings.objects.values()]
        self._modules = [one for one in readings.guards.owners if isinstance(one, nn.Module)]

    def follow(self) -> None:
        """Those that were met since the last time."""
        new = self._readings.guards.readings[self._looked_at :]
        self._looked_at += len(new)
        found = [function for one in new if _remembers(one.value) for function in functions_of(one.value)]
        if found:  # which may have called any function, and taken any of the modules
            self._idle.follow()
            self._owners += self._modules
            self._modules = []
        while found:
            names = list[str]()
            while found:
                found += self._met_by(found.pop(), names)
            for owner in self._owners:
                for name in attributes_named(owner, names):
                    self._readings.attribute(owner, name)
                    found += functions_of(_of_class(type(owner), name))

    def _met_by(self, function: FunctionType, names: list[str]) -> Iterator[FunctionType]:
        """The functions that it may call by global names and variables around it.

        ``names``: takes the attributes that it reads of anything.
        """
        if id(function) in self._done or not is_users(function.__module__):
            return
        self._done.add(id(function))
        known = names_of(function.__code__)
        for name, _ in known.globals:
            value = function.__globals__.get(name)
            yield from functions_of(value)
            if isinstance(value, ModuleType) and is_users(value.__name__):
                for attribute in known.attributes:
                    yield from functions_of(vars(value).get(attribute))
            elif isinstance(value, type):
                yield from _methods(value, "")
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # of a variable that has no value yet
                yield from functions_of(cell.cell_contents)
        new = [name for name in known.attributes if name not in self._names]
        self._names.update(new)
        names += new


def _of_class(cls: type, name: str) -> Any:
    """As ``getattr_static(cls, name, None)``, in a tenth of the time."""
    meta: type = type(cls)
    for base in (*cls.__mro__, *meta.__mro__):
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def _remembers(value: Any) -> bool:
    return type(value) is _REMEMBERING and is_users(value.__module__)


_REMEMBERING = type(cache(lambda: None))


def _methods(cls: type, beginning: str) -> Iterator[FunctionType]:
    """Those with names that begin so: of a module others are seen when they are read, of a copy of an object not."""
    for name, value in list(vars(cls).items()) if is_users_class(cls) else ():
        if name.startswith(beginning) and type(value) not in PLAIN:
            yield from functions_of(value)


def is_users_code(code: CodeType) -> bool:
    """Whether ``code`` is neither of torch and what torch stands on, nor ours, nor of Python's library."""
    if code.co_filename.startswith(_OURS) and not code.co_filename.startswith(_OUR_MODELS):
        return False
    return is_users_file(code.co_filename) and _is_of_users(_package_of(code.co_filename))


def _is_of_users(package: str) -> bool:
    return is_users(package) and package not in _TORCH_STANDS_ON


_TORCH_STANDS_ON = ("sympy", "mpmath", "tqdm", "networkx", "filelock", "typing_extensions")
_OURS = f"{Path(__file__).parents[1]}/"
_OUR_MODELS = f"{_OURS}models/"


def _package_of(filename: str) -> str:
    """The top package of an installed library; else something that is none."""
    _, installed, rest = filename.rpartition("/site-packages/")
    return rest.partition("/")[0].removesuffix(".py") if installed else "?"
