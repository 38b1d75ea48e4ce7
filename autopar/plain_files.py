"""Files that others wrote: only ordinary ones are opened, and no more of one is read than was agreed on.

A pipe or a device in place of a file would block its reader for ever, or feed it for ever; a symbolic link may lead to
a file that is none of the directory's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY  # opening a pipe does not wait for its writer then


class NotPlainError(OSError):
    """What should be a file is a pipe, a device, a directory, too large, or a link out of its directory."""


def open_plain(path: Path, *, inside: Path | None = None, writable: bool = False) -> int:
    """A descriptor of the ordinary file at ``path``, which the caller closes.

    ``inside``: the directory that has to hold the file once all symbolic links are followed.
    Raises NotPlainError, and OSError as ``os.open`` does.
    """
    if inside is not None:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(inside)):
            raise NotPlainError(f"'{path}' is a link to {real}, which is not in {inside}")
    handle = os.open(path, _FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotPlainError(f"'{path}' is no ordinary file (a pipe, a device or a directory)")
    return handle


def read_plain(path: Path, most: int, *, inside: Path | None = None) -> bytes:
    """The content of the ordinary file at ``path``, of at most ``most`` bytes. Raises as :func:`open_plain`."""
    with os.fdopen(open_plain(path, inside=inside), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise NotPlainError(f"'{path}' has {size:,} bytes, at most {most:,} are read")
        return stream.read(size)
