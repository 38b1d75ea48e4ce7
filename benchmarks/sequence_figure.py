"""Curves over two logarithmic axes, side by side, as SVG: what is counted as lines, what was measured as circles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c9c9c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 300, 260, 64, 54, 44, 60


@dataclass(frozen=True)
class Curve:
    """``points`` and ``measured``: x -> y, both above 0. A dashed curve is a formula."""

    name: str
    points: Mapping[float, float]
    measured: Mapping[float, float] = field(default_factory=dict)
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """``ticks``: y -> its label. ``across``: what x is."""

    title: str
    across: str
    curves: Sequence[Curve]
    ticks: Mapping[float, str]


def figure(panels: Sequence[Panel], title: str) -> str:
    """The SVG document."""
    each = LEFT + WIDTH + RIGHT
    width, height = each * len(panels), TOP + HEIGHT + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{title}</text>',
    ]
    for place, panel in enumerate(panels):
        lines += [f'<g transform="translate({place * each} 0)">', *_drawn(panel), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def short(number: float) -> str:
    """``32768`` -> ``32k``."""
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"


def _drawn(panel: Panel) -> Iterator[str]:
    xs = sorted({x for curve in panel.curves for x in curve.points})
    ys = [*panel.ticks, *(y for curve in panel.curves for y in (*curve.points.values(), *curve.measured.values()))]
    across, up = _scale(xs[0], xs[-1], LEFT, LEFT + WIDTH), _scale(min(ys), max(ys), TOP + HEIGHT, TOP)
    yield f'<text x="{LEFT}" y="40" font-size="12">{panel.title}</text>'
    for tick, label in panel.ticks.items():
        y = up(tick)
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for x in xs:
        yield f'<text x="{across(x):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{short(x)}</text>'
    middle = f'x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle"'
    yield f'<text {middle} font-size="12">{panel.across}</text>'
    for curve, colour in zip(panel.curves, COLOURS):
        places = [(across(x), up(y)) for x, y in sorted(curve.points.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="4 3"' if curve.dashed else ""
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        yield f'<text x="{places[-1][0] + 8:.1f}" y="{places[-1][1] + 4:.1f}" fill="{colour}">{curve.name}</text>'
        for x, y in curve.measured.items():
            place = f'cx="{across(x):.1f}" cy="{up(y):.1f}"'
            yield f'<circle {place} r="4" fill="white" stroke="{colour}" stroke-width="1.5"/>'


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """From ``low`` .. ``high``, by their logarithms, to ``start`` .. ``stop``."""
    size = math.log(high / low) or 1.0

    def place(number: float) -> float:
        return start + (stop - start) * math.log(number / low) / size

    return place
