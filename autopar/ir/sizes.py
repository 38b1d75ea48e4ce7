"""Sizes that are not numbers: in the program of a family, expressions (sympy) of the sizes of a batch."""

from __future__ import annotations

from typing import Any

import torch


def is_expression(item: Any) -> bool:
    """Whether ``item`` is an expression in the place of a number; sympy itself is not loaded to tell."""
    return hasattr(item, "free_symbols") and not isinstance(item, torch.SymInt)
