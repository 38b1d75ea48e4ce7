"""Which of many parametrized cases run by default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow_but(fast: Sequence[int], rows: Iterable[Any]) -> list[Any]:
    """``rows`` for ``parametrize``, of which those at the positions ``fast`` run by default, all others when slow."""
    rows = list(rows)
    assert set(fast) <= set(range(len(rows))), f"{fast} of {len(rows)} rows"
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        row if number in fast else pytest.param(*value, marks=pytest.mark.slow)
        for number, (row, value) in enumerate(zip(rows, values))
    ]


def one_each(first: Iterable[Any], second: Iterable[Any], fast: Sequence[tuple[int, int]] = ()) -> list[Any]:
    """All pairs for ``parametrize``; by default as many run as show each of ``first`` and each of ``second``.

    ``fast``: the positions of other pairs, to run in place of those.
    """
    firsts, seconds = ([row if isinstance(row, tuple) else (row,) for row in rows] for rows in (first, second))
    less = min(len(firsts), len(seconds))
    pairs = [(i, j) for i in range(len(firsts)) for j in range(len(seconds))]
    assert set(fast) <= set(pairs), f"{fast} of {len(firsts)} x {len(seconds)} pairs"
    chosen = [
        number for number, pair in enumerate(pairs) if (pair in fast if fast else pair[0] % less == pair[1] % less)
    ]
    return slow_but(chosen, [firsts[i] + seconds[j] for i, j in pairs])
