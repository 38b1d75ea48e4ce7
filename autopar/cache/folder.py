"""The files of the cache: written whole or not at all, checked when they are read, the longest unused ones deleted.

An entry is one file, so that one call of the system puts it in place: a line that names the format, the SHA-256 of the
rest, and its parts, each after its length. Writers do not wait for each other: the last one stays, and all
wrote the same. A file that is damaged is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import platformdirs

from autopar.cache.reasons import NotMet
from autopar.errors import AutoparError
from autopar.plain_files import read_plain

PLACE, SIZE = "AUTOPAR_CACHE", "AUTOPAR_CACHE_SIZE"
OFF = ("0", "off", "no", "false")
USUAL_SIZE = "1GB"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAGIC = b"autopar compiled program, format 2\n"
ENDING, DRAFT = ".program", ".draft"
LARGEST = 1 << 32
ABANDONED = 3600.0  # seconds after which a draft has no writer any more

logger = logging.getLogger("autopar")

T = TypeVar("T")


def place() -> Path | None:
    """The folder that ``AUTOPAR_CACHE`` names, else one in the user's cache; None where it says ``0``."""
    given = os.environ.get(PLACE, "").strip()
    if given.lower() in OFF:
        return None
    return Path(given).expanduser() if given else platformdirs.user_cache_path("autopar") / "programs"


def most_bytes() -> int:
    """What the entries may have together, as ``AUTOPAR_CACHE_SIZE`` says. Raises AutoparError for what is no size."""
    given = os.environ.get(SIZE, "").strip() or USUAL_SIZE
    number = given.upper().rstrip("KMGTB")
    unit = given.upper()[len(number) :]
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise AutoparError(f"{SIZE}={given} is no size\nWay out: a number of bytes, or 500MB, 2GB.") from None


@dataclass(frozen=True)
class File:
    """An entry on disk, as it was found."""

    path: Path
    bytes: int
    used: float


class Folder:
    """One folder of entries. ``most``: bytes that they may have together."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self._most = path, most

    def ready(self) -> bool:
        """Make the folder, which others cannot read; whether it is of use: files can be written there, or there are."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(self.path, os.W_OK) or self.files():
                return True
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as problem:
            _tell_once(self.path, problem)
            return False

    def files(self, key: str = "") -> list[File]:
        """The entries of ``key``, or all; the latest used first."""
        found = []
        with suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(key) and entry.name.endswith(ENDING):
                    with suppress(OSError):  # deleted meanwhile
                        found.append(File(Path(entry.path), entry.stat().st_size, entry.stat().st_mtime))
        return sorted(found, key=lambda file: (-file.used, file.path.name))

    def read(self, path: Path) -> list[bytes] | None:
        """The parts of an entry; None where there is none, or a damaged one, which is deleted."""
        try:
            content = read_plain(path, LARGEST, inside=self.path)
        except OSError:
            return None
        found = _parts(content)
        if found is None:
            logger.warning("the compiled program %s is damaged and was deleted", path)
            self.delete(path)
        return found

    def first(self, key: str, what: str, read: Callable[[Path, list[bytes]], T]) -> T | None:
        """What ``read`` makes of the first entry of ``key`` that serves; of one that does not it raises NotMet.

        One at which it fails otherwise is deleted, and the warning says ``what`` it was: these very files wrote it, and
        whatever is wrong with it, what it held can be computed.
        """
        for file in self.files(key):
            content = self.read(file.path)
            if content is None:
                continue
            try:
                found = read(file.path, content)
            except NotMet as reason:
                logger.debug("%s does not serve: %s", file.path.name, reason)
                continue
            except Exception as problem:
                logger.warning("%s %s cannot be read (%r) and was deleted", what, file.path, problem)
                self.delete(file.path)
                continue
            self.touch(file.path)
            return found
        return None

    def is_ours_alone(self, path: Path) -> bool:
        """Whether nobody but this user (and the system's) can have written the entry."""
        try:
            found = [os.lstat(self.path), os.lstat(path)]
        except OSError:
            return False
        return all(about.st_uid == os.getuid() and not about.st_mode & 0o022 for about in found)

    def write(self, name: str, *parts: bytes) -> bool:
        """Put an entry in place, then delete what is too much. A full disk or the like is told once; False then."""
        rest = joined_parts(parts)
        content = MAGIC + hashlib.sha256(rest).digest() + rest
        if len(content) > min(self._most, LARGEST):
            logger.debug("not kept: %d bytes, and all programs may have %d", len(content), self._most)
            return False
        draft = self.path / f".{name}.{os.getpid()}-{secrets.token_hex(4)}{DRAFT}"
        try:
            with open(draft, "xb", opener=_for_others_to_read) as stream:
                stream.write(content)
            os.replace(draft, self.path / f"{name}{ENDING}")
        except OSError as problem:
            _tell_once(self.path, problem)
            return False
        finally:
            self.delete(draft)
        self._evict(keep=f"{name}{ENDING}")
        return True

    def touch(self, path: Path) -> None:
        """An entry is used now."""
        with suppress(OSError):
            os.utime(path)

    def delete(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def clear(self) -> int:
        """Delete everything of ours; gives the number of entries."""
        files = self.files()
        for path in (*(file.path for file in files), *self._others()):
            self.delete(path)
        return len(files)

    def _evict(self, keep: str) -> None:
        files = self.files()
        total = sum(file.bytes for file in files)
        for file in reversed(files):
            if total <= self._most:
                break
            if file.path.name != keep:
                self.delete(file.path)
                total -= file.bytes
        for path in self._others():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    self.delete(path)

    def _others(self) -> Iterator[Path]:
        """Drafts, locks and what they say."""
        with suppress(OSError):
            yield from [path for path in self.path.iterdir() if path.suffix in (DRAFT, ".lock", ".outcome")]


def described(model: str, mesh: object, call: object, seconds: float) -> bytes:
    """The first part of an entry: what ``autopar cache`` lists of it. ``seconds``: what it took to make."""
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    about = {"model": model, "mesh": str(mesh), "call": str(call), "compiled": made, "seconds": f"{seconds:.1f}"}
    return json.dumps(about).encode()


def _for_others_to_read(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def _parts(content: bytes) -> list[bytes] | None:
    start = len(MAGIC) + 32
    rest = content[start:]
    if not content.startswith(MAGIC) or hashlib.sha256(rest).digest() != content[len(MAGIC) : start]:
        return None
    return split_parts(rest)


def joined_parts(parts: Sequence[bytes]) -> bytes:
    """Each after its length."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def split_parts(content: bytes) -> list[bytes]:
    """The inverse of :func:`joined_parts`."""
    found, place = [], 0
    while place < len(content):
        end = place + 8 + int.from_bytes(content[place : place + 8], "big")
        found.append(content[place + 8 : end])
        place = end
    return found


_told: set[tuple[str, int | None]] = set()


def _tell_once(path: Path, problem: OSError) -> None:
    known = str(path), problem.errno
    if known in _told:
        return
    _told.add(known)
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "there is no room" if full else problem.strerror or str(problem)
    logger.warning(
        "compiled programs are not kept in %s: %s; all goes on without (%s=DIR for another folder, %s=0 for none)",
        path, reason, PLACE, PLACE,
    )  # fmt: skip
