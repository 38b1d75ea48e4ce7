"""Which of many parametrized cases run by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def slow_but(fast: Sequence[int], rows: Sequence[Any]) -> list[Any]:
    """``rows`` for ``parametrize``, of which those at the positions ``fast`` run by default, all others when slow."""
    assert set(fast) <= set(range(len(rows))), f"{fast} of {len(rows)} rows"
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        row if number in fast else pytest.param(*value, marks=pytest.mark.slow)
        for number, (row, value) in enumerate(zip(rows, values))
    ]
