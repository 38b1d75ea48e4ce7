"""Of the processes of a machine that want to compile the same region, one does, and the others find it on the disk."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Within this context no other process of this user is in that of ``name``; without a disk, or locks, some may be.

    The system lets go of a lock when its process ends, however it does.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"autopar_inductor_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder / name, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
