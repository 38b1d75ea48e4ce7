"""Files whose bytes are counted and summed up as they are written: a checksum of each, and a sign of life.

The checksum is the CRC-32 of zlib: it finds every single flipped bit, and any other damage but for one in 2^32.
"""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

PORTION = 1 << 24  # bytes from one sign of life to the next
BUFFER = 1 << 20  # bytes


class Progress:
    """When some work has last moved data."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def advance(self) -> None:
        self._last = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._last


class WatchedFile(io.FileIO):
    """An ordinary file; ``checksum`` is that of what was written, ``problem`` what a write has failed with."""

    problem: OSError | None = None

    def __init__(self, path: Path, mode: str, progress: Progress) -> None:
        super().__init__(path, mode)
        self.checksum, self._progress = 0, progress

    def write(self, data: Any) -> int:
        portion = memoryview(data).cast("B")[:PORTION]
        try:
            count = super().write(portion)
        except OSError as problem:
            self.problem = problem
            raise
        self.checksum = zlib.crc32(portion[:count], self.checksum)
        self._progress.advance()
        return count

    def readinto(self, into: Any) -> int:
        count = super().readinto(memoryview(into).cast("B")[:PORTION])
        self._progress.advance()
        return count


class SyncedWriter(io.BufferedWriter):
    """Closes a file once all of it is on the disk. (torch syncs what has left the buffer.)"""

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
        super().close()


class WatchedFiles(FileSystem):
    """The files of torch's reader and writer of checkpoints. ``written``: name -> (bytes, checksum).

    ``problem``: what the first write that failed has failed with. (torch's own words for it can be others: closing the
    archive that could not be written fails next.)
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.written: dict[str, tuple[int, int]] = {}
        self.problem: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        file = WatchedFile(Path(path), mode, self.progress)
        stream = io.BufferedReader(file, BUFFER) if mode == "rb" else SyncedWriter(file, BUFFER)
        try:
            with stream:
                yield stream
        finally:
            self.problem = self.problem or file.problem
        if mode != "rb":
            self.written[Path(path).name] = Path(path).stat().st_size, file.checksum


def checksum(path: Path, advance: Callable[[], None] = lambda: None) -> int:
    """Of the content of a file. Raises OSError."""
    found, buffer = 0, memoryview(bytearray(PORTION))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
            advance()
    return found
