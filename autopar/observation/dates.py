"""Who asks for the date, in C, where nothing can be put in its place: the profiler tells.

Log lines have a date, which goes into no graph: those of installed packages, and those of a ``logging.Formatter`` of
the user's.
"""

from __future__ import annotations

import cProfile
import logging
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from autopar.errors import TraceError
from autopar.observation.forbidden import CHANGES, PASS_IT
from autopar.observation.source_lines import INSTALLED, is_users_file

_NAMES = ("now", "utcnow")
_CALLED = tuple(f"<built-in method {name}>" for name in _NAMES)
_LOGGING = str(Path(logging.__file__).parent)
_TORCH = str(Path(str(torch.__file__)).parent)
_OF_LOGGING = {
    name for cls in (logging.Formatter, logging.Handler, logging.Filter) for name in vars(cls) if name[:1] != "_"
}


def refuse_dates(profile: cProfile.Profile) -> None:
    """Raise TraceError where functions of users have asked for the date while ``profile`` was enabled."""
    entries = profile.getstats()
    unknown = sum(entry.callcount for entry in entries if entry.code in _CALLED)
    if not unknown:
        return
    callers: dict[Any, dict[Any, int]] = {}
    for entry in entries:
        for called in entry.calls or ():
            callers.setdefault(called.code, {})[entry.code] = called.callcount
    unknown -= sum(sum(callers.get(name, {}).values()) for name in _CALLED)
    asking = {code for name in _CALLED for code in callers.get(name, {}) if _is_users(code)}
    codes = {entry.code: entry.callcount for entry in entries if isinstance(entry.code, CodeType)}
    if unknown:  # by functions in whose midst the profiler was enabled
        asking.update(code for code in codes if _is_users(code) and set(_NAMES) & set(code.co_names))
    found = [code for code in asking if not _is_for_logs(code, codes, callers)]
    is_told = asking or not unknown or any(_is_of_loggers(code) for code in codes)
    if found or not is_told:
        names = sorted(f"{code.co_qualname} of {Path(code.co_filename).name}:{code.co_firstlineno}" for code in found)
        where = f"\n  in {', '.join(names)}" if names else ""
        raise TraceError(f"forward asks for the time (datetime.now), which {CHANGES}{where}\nWay out: {PASS_IT}")


def _is_users(code: Any) -> bool:
    """Whether ``code`` is a user's own, of no installed package."""
    name = code.co_filename if isinstance(code, CodeType) else ""
    return name == "<string>" or INSTALLED not in name and bool(name) and is_users_file(name)  # "<string>": by exec


def _is_of_loggers(code: Any) -> bool:
    name = code.co_filename if isinstance(code, CodeType) else ""
    return name.startswith(_LOGGING) or INSTALLED in name and not is_users_file(name) and not name.startswith(_TORCH)


def _is_for_logs(code: CodeType, codes: dict[CodeType, int], callers: dict[Any, dict[Any, int]]) -> bool:
    """Whether ``code`` overrides something of ``logging``'s, or only such functions call it."""
    overriding = _OF_LOGGING if any(one.co_filename.startswith(_LOGGING) for one in codes) else set[str]()
    known = callers.get(code, {})
    return code.co_name in overriding or (
        sum(known.values()) == codes[code]
        and all(_is_of_loggers(one) or getattr(one, "co_name", "") in overriding for one in known)
    )
