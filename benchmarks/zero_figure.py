"""Stacked bars in groups, as SVG: what is held, beside what formulas say and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#9c9c9c")
HEIGHT, BOTTOM, TOP, LEFT = 260, 40, 64, 56
WIDTH, GAP, BETWEEN = 34, 10, 30  # of a bar, between bars, between groups
TICKS = 5


@dataclass(frozen=True)
class Bar:
    """Bytes. ``measured`` is drawn as a circle where there is one, ``formula`` as a dashed line."""

    group: str
    name: str
    parts: tuple[float, ...]
    formula: float
    measured: float | None


def figure(bars: Sequence[Bar], names: Sequence[str], title: str) -> str:
    """The SVG document; ``names`` are those of the parts, from the bottom up."""
    most = max(max(sum(bar.parts), bar.formula, bar.measured or 0) for bar in bars) / 1e6
    step = _round_step(most / TICKS)
    scale = HEIGHT / (step * math.ceil(most / step))
    places = list(_places(bars))
    right = places[-1] + WIDTH + BETWEEN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{TOP + HEIGHT + BOTTOM}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{right}" height="{TOP + HEIGHT + BOTTOM}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{title}</text>',
        *_legend(names),
    ]
    for tick in range(math.ceil(most / step) + 1):
        y = TOP + HEIGHT - tick * step * scale
        lines.append(f'<line x1="{LEFT - 6}" x2="{right - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{tick * step:g} MB</text>')
    for bar, x in zip(bars, places):
        lines += _drawn(bar, x, scale / 1e6)
    for group, members in groupby(zip(bars, places), lambda pair: pair[0].group):
        first, *_, last = [x for _, x in members]
        middle = (first + last + WIDTH) / 2
        lines.append(f'<text x="{middle}" y="{TOP + HEIGHT + 32}" text-anchor="middle" font-size="12">{group}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _places(bars: Sequence[Bar]) -> Iterator[int]:
    x = LEFT
    for before, bar in zip([bars[0], *bars], bars):
        x += BETWEEN if bar.group != before.group else 0
        yield x
        x += WIDTH + GAP


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = LEFT
    for name, colour in zip(names, COLOURS):
        yield f'<rect x="{x}" y="30" width="11" height="11" fill="{colour}"/><text x="{x + 15}" y="40">{name}</text>'
        x += 30 + 7 * len(name)
    yield f'<line x1="{x}" x2="{x + 18}" y1="36" y2="36" stroke="black" stroke-dasharray="4 2" stroke-width="1.5"/>'
    yield f'<text x="{x + 22}" y="40">formula</text>'
    yield f'<circle cx="{x + 84}" cy="36" r="4" fill="white" stroke="black" stroke-width="1.5"/>'
    yield f'<text x="{x + 93}" y="40">measured in processes</text>'


def _drawn(bar: Bar, x: int, scale: float) -> Iterator[str]:
    floor = float(TOP + HEIGHT)
    y = floor
    for size, colour in zip(bar.parts, COLOURS):
        y -= size * scale
        yield f'<rect x="{x}" y="{y:.1f}" width="{WIDTH}" height="{size * scale:.1f}" fill="{colour}"/>'
    line = floor - bar.formula * scale
    yield (
        f'<line x1="{x - 4}" x2="{x + WIDTH + 4}" y1="{line:.1f}" y2="{line:.1f}" stroke="black" '
        'stroke-dasharray="4 2" stroke-width="1.5"/>'
    )
    if bar.measured is not None:
        place = f'cx="{x + WIDTH / 2}" cy="{floor - bar.measured * scale:.1f}"'
        yield f'<circle {place} r="4" fill="white" stroke="black" stroke-width="1.5"/>'
    yield f'<text x="{x + WIDTH / 2}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{bar.name}</text>'


def _round_step(size: float) -> float:
    """The next of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= size)
