"""What a run depends on, and nobody saw being read.

An object that forward makes is no attribute of anything, so nothing tells of the methods that are read of it; and
``x()``, ``x * y`` and ``for y in x`` ask the class. But the code that ran is known. What it reads of globals and of
the variables around it counts as that of all other functions.

A function that remembers what it gave (``functools.cache``) may have run before, with any object as an argument. Of the
objects that a run meets then all counts that any function names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from autopar.frontend.code_names import functions_of, is_users, is_users_class
from autopar.frontend.readings import Readings
from autopar.frontend.source_lines import is_users_file


def follow_what_ran(readings: Readings, ran: Iterable[CodeType]) -> None:
    """Follow the functions of ``ran``, as far as they are found, in ``readings`` of a run that is over."""
    code, looked_at = set(filter(is_users_code, ran)), set[type]()
    readings.is_over = True
    for function in _by_place(code):
        readings.function(function)
    while True:
        meet_what_is_remembered(readings)
        readings.spread()
        met = (*readings.spaces.classes(), *map(type, readings.guards.owners))
        classes = [cls for cls in dict.fromkeys(met) if cls not in looked_at]
        if not classes:
            return
        looked_at.update(classes)
        for cls in classes:
            for function in _methods(cls):
                if function.__code__ in code:
                    readings.function(function)


def meet_what_is_remembered(readings: Readings) -> None:
    """For ``readings`` of a run that is over, whether it was watched or is repeated."""
    if not any(_remembers(one.value) for one in readings.guards.readings):
        return
    for owner, _ in list(readings.objects.values()):
        readings.spaces.meet(owner)
    for owner in readings.guards.owners:
        if isinstance(owner, nn.Module) and any(map(_remembers, vars(type(owner)).values())):
            readings.spaces.meet(owner)


def _remembers(value: Any) -> bool:
    return isinstance(value, _REMEMBERING) and is_users(value.__module__)


_REMEMBERING = type(cache(lambda: None))


def _methods(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        for value in list(vars(base).values()) if is_users_class(base) else ():
            yield from functions_of(value)


def _by_place(code: Iterable[CodeType]) -> Iterator[FunctionType]:
    """Those that stand in a module, or in a class there, under their own names."""
    modules = {getattr(module, "__file__", None): module for module in list(sys.modules.values())}
    for one in sorted(code, key=lambda one: (one.co_filename, one.co_firstlineno, one.co_qualname)):
        found: Any = modules.get(one.co_filename)
        for part in one.co_qualname.split("."):
            own = getattr(found, "__dict__", {})
            found = own.get(part)
        yield from (function for function in functions_of(found) if function.__code__ is one)


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
