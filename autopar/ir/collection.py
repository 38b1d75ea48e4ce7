"""Python's garbage collector while graphs are made and rewritten."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage collection turned off: compiling makes millions of small objects and hardly any garbage.

    Collection goes through all of them again and again, a quarter of the time of a DeepSeek-V3 of 61 layers. What is
    left lying without it, the graphs of earlier passes, is a sixth of the peak of memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
