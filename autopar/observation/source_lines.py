"""The line of the user's code that is running."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

UNKNOWN_LINE = "an unknown line"
INSTALLED = "site-packages"


Place = tuple[CodeType | None, int]  # an instruction of the user's code


def place_of_user() -> Place:
    """The instruction of the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users_file(frame.f_code.co_filename):
        frame = frame.f_back
    return (None, 0) if frame is None else (frame.f_code, frame.f_lasti)


def user_line(frames: traceback.StackSummary | None = None) -> str:
    """``file.py:12 in forward: x = self.up(x)`` of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(frames if frames is not None else traceback.extract_stack()):
        if is_users_file(frame.filename):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    return UNKNOWN_LINE


def line_of_user(frame: FrameType | None) -> str:
    """As :func:`user_line`, from ``frame`` outwards; fast."""
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users_file(name):
            line = linecache.getline(name, frame.f_lineno).strip()
            return f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}: {line}"
        frame = frame.f_back
    return UNKNOWN_LINE


@cache
def is_users_file(filename: str) -> bool:
    """Whether code of ``filename`` is a user's: neither torch's, ours nor Python's, nor written by a program.

    Nor is it of a package that writes log lines, in which the time may be.

    What is typed is (``<stdin>``, ``<ipython-input-3-...>``, ``<console>``).
    """
    if filename.startswith(_OF_NO_USER):
        return filename.startswith(_OUR_MODELS)  # which are models like others
    _, is_installed, inside = filename.partition(INSTALLED)
    return not inside.startswith(_LOGGERS) if is_installed else not filename.startswith(_PYTHON)


_OURS = Path(__file__).parents[1]
_OUR_MODELS = str(_OURS / "models")
_OF_PROGRAMS = ("<frozen ", "<string>", "<eval_with_key>", "<attrs gen", "<decorator-gen", "<lambdifygen", "<__array")
_OF_NO_USER = (*_OF_PROGRAMS, str(_OURS), str(Path(str(torch.__file__)).parent))
_LOGGERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("rich", "loguru", "structlog"))
_PYTHON = str(Path(traceback.__file__).parent)
