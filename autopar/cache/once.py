"""One process of a machine compiles a program, and the others wait for it.

They wait for a lock on a file, which the system takes from a process that dies, however it does: then the next one
compiles. Where compiling fails, or the program cannot be kept, the one that tried says so beside the lock, and all the
other ranks of its launch compile at the same time, so that each has the same error, or the same program.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from autopar.cache.folder import Folder

NOTICE = 5.0  # seconds of waiting before somebody is told
ABANDONED = 86400.0  # seconds after which no launch uses its folder any more, which it does while it compiles

logger = logging.getLogger("autopar")


class Turn:
    """The right to compile one program. ``waited``: another process had it first, and may have left the program."""

    def __init__(self, outcome: Path | None, waited: bool = False) -> None:
        self._outcome, self.waited = outcome, waited

    def left_nothing(self, reason: str) -> None:
        """Tell the ranks that wait that they need not."""
        if self._outcome is not None:
            with suppress(OSError):
                draft = self._outcome.with_suffix(f".{secrets.token_hex(4)}.draft")
                draft.write_text(f"{launch()}\n{reason}\n", encoding="utf-8")
                os.replace(draft, self._outcome)


@contextmanager
def turn(folder: Folder, key: str, longest: float) -> Iterator[Turn]:
    """The turn for ``key``, after at most ``longest`` seconds; without a lock where there can be none.

    It ends before this context does where another rank of this launch has said that it left nothing.
    """
    path, outcome = folder.path / f"{key}.lock", folder.path / f"{key}.outcome"
    lock = FileLock(path)
    start = time.monotonic()
    try:
        waited = _acquired(lock, longest)
    except (OSError, Timeout, NotImplementedError) as problem:
        logger.debug("compiling without a lock: %s", problem)
        yield Turn(None, waited=time.monotonic() - start > longest)
        return
    try:
        if _said_by_this_launch(outcome):
            lock.release()
            yield Turn(None, waited)
        else:
            yield Turn(outcome, waited)
    finally:
        lock.release()


def _acquired(lock: FileLock, longest: float) -> bool:
    """Take the lock; whether that meant to wait."""
    try:
        lock.acquire(timeout=0)
        return False
    except Timeout:
        pass
    try:
        lock.acquire(timeout=min(NOTICE, longest))
    except Timeout:
        logger.info("waiting for another process, which compiles the same program")
        lock.acquire(timeout=max(0.0, longest - NOTICE))
    return True


def _said_by_this_launch(outcome: Path) -> bool:
    try:
        return outcome.read_text(encoding="utf-8").partition("\n")[0] == launch()
    except OSError:
        return False


def launch() -> str:
    """What the ranks of one launch on one machine have in common; a process that is no rank has its own."""
    if "RANK" not in os.environ:
        return f"process {os.getpid()} {_started(os.getpid())}"
    parent = os.getppid()
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return " ".join(("launch", str(parent), _started(parent), *(os.environ.get(name, "") for name in names)))


def _started(process: int) -> str:
    """When a process was started, in the system's units; numbers of processes are used again."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


# ---------------------------------------------------------------- without a cache


def is_one_of_many() -> bool:
    """Whether other ranks of this launch are on this machine."""
    return "RANK" in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))) > 1


def folder_of_launch() -> Path | None:
    """A folder of this launch alone, in which its ranks on this machine share what one compiles; None if there is none.

    It goes when the first rank ends.
    """
    _remove_old(Path(tempfile.gettempdir()))
    name = hashlib.sha256(launch().encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"autopar-{os.getuid()}-{name}")
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        about = os.lstat(path)
        if about.st_uid == os.getuid() and not about.st_mode & 0o077:
            return path
    return None


def _remove_old(folder: Path) -> None:
    """Folders of launches whose first rank was killed."""
    for path in folder.glob(f"autopar-{os.getuid()}-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                remove_folder_of_launch(path)


def remove_folder_of_launch(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
