"""State of Python's library and numpy's for which functions ask by a name of its own; each call asks for it again.

Whoever has such a name in his code counts as asking, whether or not he is answered by these.
"""

from __future__ import annotations

import decimal
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

from autopar.observation.source_lines import INSTALLED, is_users_file


def _levels() -> Any:
    known = dict(logging.root.manager.loggerDict)
    loggers = {name: one for name, one in known.items() if isinstance(one, logging.Logger)} | {"": logging.root}
    set_ones = {name: (one.level, one.disabled) for name, one in loggers.items() if one.level or one.disabled}
    return logging.root.manager.disable, tuple(sorted(set_ones.items()))


def _errors_of_numpy() -> Any:
    numpy: Any = sys.modules.get("numpy")
    return tuple(numpy.geterr().items()) if numpy is not None else ()


def _context() -> str:
    return str(decimal.getcontext())


STATE: Mapping[str, Callable[[], Any]] = {
    "the arguments of the program (sys.argv)": lambda: tuple(sys.argv),
    "the levels of logging": _levels,
    "numpy's error state": _errors_of_numpy,
    "decimal's context": _context,
    "the working directory": os.getcwd,
    "the number of this process": os.getpid,
}
_ARGUMENTS, _LEVELS, _ERRORS, _CONTEXT, _FOLDER, _PROCESS = STATE
_NAMES = {
    "argv": _ARGUMENTS, "orig_argv": _ARGUMENTS, "isEnabledFor": _LEVELS, "getEffectiveLevel": _LEVELS,
    "geterr": _ERRORS, "getcontext": _CONTEXT, "getcwd": _FOLDER, "getpid": _PROCESS,
}  # fmt: skip
_OF_ATTRIBUTES = ("vars", "dir", "__dict__")


def named_in(codes: Iterable[CodeType]) -> set[str]:
    """The names in :data:`STATE` for which functions of users among ``codes`` ask."""
    return {
        _NAMES[name]
        for code in codes
        if not _NAMES.keys().isdisjoint(code.co_names) and is_users_file(code.co_filename)
        for name in code.co_names
        if name in _NAMES
    }


def asks_for_attributes(codes: Iterable[CodeType]) -> CodeType | None:
    """The first of ``codes`` of users that may list the attributes of something, by vars and dir.

    Installed packages do so with their configs.
    """
    found = (one for one in codes if any(name in one.co_names for name in _OF_ATTRIBUTES))
    return next((one for one in found if INSTALLED not in one.co_filename and is_users_file(one.co_filename)), None)
