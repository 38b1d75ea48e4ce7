"""Frames of stack traces, made once for each line: torch writes the stack of each operator that it traces.

This is the one file that knows ``torch.utils._traceback._extract_symbolized_tb``. Torch makes a frame with the text of
its line anew for each of about 60 lines below each operator, an eighth of the time of a trace.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils import _traceback

NAME = "_extract_symbolized_tb"


@contextmanager
def frames_made_once() -> Iterator[None]:
    """Within this context, stack traces of one line share its frame; nothing changes where torch has no such place."""
    frames: dict[tuple[str, int, str], traceback.FrameSummary] = {}

    def stack_of(found: Sequence[Mapping[str, Any]], skip: int) -> traceback.StackSummary:
        stack = traceback.StackSummary()
        for entry in reversed(found[skip:]):
            key = entry["filename"], entry["line"], entry["name"]
            if key not in frames:
                frames[key] = traceback.FrameSummary(*key)
            stack.append(frames[key])
        return stack

    if not hasattr(_traceback, NAME):
        yield
        return
    with mock.patch.object(_traceback, NAME, stack_of):
        yield
