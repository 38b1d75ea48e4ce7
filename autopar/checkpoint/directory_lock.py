"""One process at a time saves into a directory: a lock that the system takes back when its holder ends, or is killed.

.lock    {"host": "node-3", "pid": 4711, "since": "2026-11-28T20:04:44"}

The lock is the record lock (``fcntl.lockf``) on the file, which child processes do not inherit; its content is for the
message. On a file system without locks the content decides: a holder on this host that is gone has left it behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from autopar.errors import CheckpointError

NAME = ".lock"
LARGEST = 1 << 12  # bytes of such a file
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, DirectoryLock] = {}  # by real path: record locks are the process's, not the object's


class DirectoryLock:
    """The lock of a directory, held by this process until as many :meth:`release` as :func:`hold_directory`."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle, self._owner, self._users = path, handle, os.getpid(), 0

    def use(self) -> DirectoryLock:
        self._users += 1
        return self

    def release(self) -> None:
        """May be called in a forked child, which has no lock, to no effect."""
        if os.getpid() != self._owner or self._users == 0:
            return
        self._users -= 1
        if self._users == 0:
            _held.pop(str(self._path), None)
            with suppress(OSError):
                self._path.unlink()
            os.close(self._handle)


def hold_directory(directory: Path) -> DirectoryLock:
    """The lock of ``directory``, which is made if need be.

    Raises CheckpointError, naming host and process, where another process has it; OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / NAME
    if str(path) not in _held:
        _held[str(path)] = DirectoryLock(path, _locked(path))
    return _held[str(path)].use()


def writer_name() -> str:
    """A name for files that this process has not finished: its host and number."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())[:60]}-{os.getpid()}"


def _locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not _lock(handle):
                _refuse_if_held(path, _content(handle))
            if _is_at(path, handle):  # and was not deleted by the holder before
                _write(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock the file; False where the file system has no locks. Raises CheckpointError."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(_content(handle)) from None
        if problem.errno in NO_LOCKS:
            return False
        raise
    return True


def _refuse_if_held(path: Path, content: dict[str, Any]) -> None:
    """Without locks: raise CheckpointError unless the holder that the file names was on this host, and is gone."""
    host, pid = content.get("host"), content.get("pid")
    if host == socket.gethostname() and isinstance(pid, int) and not _is_alive(pid) or not content:
        return
    raise _in_use(content, f"if that process is gone, delete '{path}'")


def _in_use(content: dict[str, Any], way_out: str = "or end that process first") -> CheckpointError:
    who = f"process {content.get('pid', '?')} on host {content.get('host', '?')}, since {content.get('since', '?')}"
    return CheckpointError(
        f"another run saves into this directory: {who}\nWay out: save to another directory; {way_out}."
    )


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _content(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, LARGEST, 0))
    except ValueError:  # its holder is just writing it, or a disk was full
        return {}
    return found if isinstance(found, dict) else {}


def _write(handle: int) -> None:
    content = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S")}
    os.ftruncate(handle, 0)
    with suppress(OSError):  # a full disk: the lock is held all the same, and what is saved next says so
        os.pwrite(handle, json.dumps(content).encode(), 0)
