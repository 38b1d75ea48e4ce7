"""One directory takes the place of another, so that at every moment one of the two is there, whole."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD of Linux: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE


def put(draft: Path, target: Path) -> None:
    """``draft`` becomes ``target``; a directory that was there is deleted by the caller, as ``draft``.

    Where a file system cannot exchange two directories at once (NFS), a process that is killed between the two renames
    leaves the old one beside ``target``, as ``.<name>.old``. Raises OSError, and ``target`` is as before.
    """
    if not target.exists():
        draft.rename(target)
        return
    if _exchanged(draft, target):
        return
    old = old_of(target)
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(draft)


def old_of(target: Path) -> Path:
    """Where :func:`put` keeps the old directory between two renames."""
    return target.with_name(f".{target.name}.old")


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two have changed places, by one call of the system."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
