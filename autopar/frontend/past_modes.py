"""Reading the shape or dtype of a tensor past all modes, which cost ten microseconds each; and which modes there are.

This is the one file that needs ``torch._C.DisableTorchFunction``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack


def past_modes() -> AbstractContextManager[Any]:
    """Within this context, what is done with tensors is told to no ``TorchFunctionMode`` and no subclass."""
    found: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return found


def function_modes() -> tuple[int, ...]:
    """Which ``TorchFunctionMode`` are on, outermost first."""
    found: Any = _get_current_function_mode_stack
    return tuple(map(id, found()))
