"""Curves as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float, high: float, width: int = 60) -> str:
    """``values`` as a row of at most ``width`` blocks, each the mean of its values, between ``low`` and ``high``."""
    cells = []
    count = min(width, len(values))
    for cell in range(count):
        chosen = values[cell * len(values) // count : (cell + 1) * len(values) // count]
        mean = sum(chosen) / len(chosen)
        if not math.isfinite(mean):
            cells.append("!")
            continue
        height = (mean - low) / (high - low) if high > low else 0.0
        cells.append(BLOCKS[min(len(BLOCKS) - 1, max(0, int(height * len(BLOCKS))))])
    return "".join(cells)
