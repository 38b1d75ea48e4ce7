"""What can go wrong with a disk, in words, and what makes a change on it last."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from autopar.errors import CheckpointError


def disk_failed(directory: Path, problem: OSError) -> CheckpointError:
    """The error for a write below ``directory`` that failed."""
    if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"'{directory}': {problem}")
    free = shutil.disk_usage(directory).free
    return CheckpointError(
        f"no space left in '{directory}': {problem.strerror}; the disk has {free:,} bytes that are free\n"
        "Nothing of what was begun is left there; what was saved before is complete.\n"
        "Way out: free some space, or another disk; of checkpoints, one more than are kept has to find room."
    )


def sync_directory(path: Path) -> None:
    """Make files that were created, or renamed, in a directory survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
