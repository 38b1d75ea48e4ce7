"""Memory that Python, or torch, has freed: back to the system, or kept for the next step."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 1 << 30  # bytes that lie freed at the end of the heap, of which more goes back
OF_THE_HEAP = 32 << 20  # bytes of an allocation, of which a larger one has pages of its own: the most that glibc takes


def give_back() -> None:
    """Let go of what lies freed between allocations; nothing where the C library has no ``malloc_trim`` (glibc's).

    Compiling frees millions of small objects, and glibc keeps the pages: some 70 MB of a process, which no step fills.
    """
    trim = _of_c("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def keep_freed() -> None:
    """From now on let freed memory stay with the process, for the next step; nothing where the user has set glibc.

    By itself glibc gives the end of the heap back when it is twice as large as the largest allocation so far, that is
    at the end of each step with large messages. The next step asks for it again, page by page, each filled with zeros:
    of 14 million parameters on 4 ranks 66 MB, 5 % of the processors' time.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    option = _of_c("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, OF_THE_HEAP)  # it would follow what is freed no more
        option(TRIM_THRESHOLD, KEPT)


def _of_c(name: str) -> Any:
    """A function of the C library; None where there is none."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
