"""Reading the shape or dtype of a tensor past all modes, which cost ten microseconds each.

This is the one file that needs ``torch._C.DisableTorchFunction``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def past_modes() -> AbstractContextManager[Any]:
    """Within this context, what is done with tensors is told to no ``TorchFunctionMode`` and no subclass."""
    found: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return found
