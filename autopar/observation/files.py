"""Files that forward reads, or looks for: a graph has what was in them, and each call looks whether they have changed.

``open`` and ``stat`` are watched where code of users calls them, perhaps through Python's library, numpy or
``torch.load``. Files that are written, and what others open, are not.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any
from unittest import mock

from autopar.ir.guards import Question
from autopar.observation.source_lines import is_users_file

_LIBRARY = os.path.dirname(os.__file__)
_THROUGH = ("<frozen os>", "<frozen genericpath>", "<frozen posixpath>") + tuple(
    os.path.join(_LIBRARY, name)
    for name in ("pathlib.py", "genericpath.py", "posixpath.py", "json/", "csv.py", "pickle.py", "gzip.py", "codecs.py")
)
_INSTALLED = (f"{os.sep}numpy{os.sep}", os.path.join(f"{os.sep}torch", "serialization.py"))


def files_of_users(met: set[str]) -> Callable[[], Any]:
    """A context within which ``met`` collects the files that code of users reads or looks for."""

    @contextmanager
    def watched() -> Iterator[None]:
        opened, stat, thread = builtins.open, os.stat, threading.get_ident()

        def note(file: Any) -> None:
            is_named = isinstance(file, (str, bytes, os.PathLike)) and threading.get_ident() == thread
            if is_named and _is_asked_by_user(sys._getframe(2)):
                met.add(os.path.abspath(os.fsdecode(file)))

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax"):
                note(file)
            return opened(file, mode, *args, **kwargs)

        def stat_(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            note(path)
            return stat(path, *args, **kwargs)

        with (
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(io, "open", open_),
            mock.patch.object(os, "stat", stat_),
        ):
            yield

    return watched


def question_of_file(path: str) -> Question:
    """Which file is there, as far as its size and the time of its latest change tell."""
    ask = partial(_state_of, path)
    return Question(ask, ask(), f"the file {path}")


def _state_of(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def _is_asked_by_user(frame: FrameType | None) -> bool:
    while frame is not None and _passes_on(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and is_users_file(frame.f_code.co_filename)


def _passes_on(filename: str) -> bool:
    return filename.startswith(_THROUGH) or any(part in filename for part in _INSTALLED)
