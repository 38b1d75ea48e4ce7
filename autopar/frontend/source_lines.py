"""The line of the user's code that is running."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

UNKNOWN_LINE = "an unknown line"


def user_line(frames: traceback.StackSummary | None = None) -> str:
    """``file.py:12 in forward: x = self.up(x)`` of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(frames if frames is not None else traceback.extract_stack()):
        if _is_users(frame.filename):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    return UNKNOWN_LINE


def _is_users(filename: str) -> bool:
    if filename.startswith(("<", *(str(Path(str(file)).parent) for file in (__file__, torch.__file__)))):
        return False
    return "site-packages" in filename or not filename.startswith(str(Path(traceback.__file__).parent))
