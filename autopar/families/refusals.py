"""Whether a model does not take some sizes, or the compiler failed on them: nobody has asked for these sizes."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from autopar.errors import AutoparError, InvariantError

ROOT = Path(__file__).parents[1]
TRACER, MODELS = ROOT / "frontend" / "trace.py", ROOT / "models"


def is_refusal(problem: Exception) -> bool:
    """Whether ``problem``, raised by a compile, says that these sizes have no program.

    So do the errors that a user can meet, a lack of memory, and whatever the model itself, or an operator that it
    calls, raises while it is traced. All else is a fault of the compiler.
    """
    if isinstance(problem, AutoparError):
        return not isinstance(problem, InvariantError)
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(problem.__traceback__)]
    by_compiler = files[-1].is_relative_to(ROOT) and not files[-1].is_relative_to(MODELS)
    return TRACER in files and not by_compiler
