"""Memory that Python has freed, back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Let go of what lies freed between allocations; nothing where the C library has no ``malloc_trim`` (glibc's).

    Compiling frees millions of small objects, and glibc keeps the pages: some 70 MB of a process, which no step fills.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
