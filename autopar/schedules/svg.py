"""A timeline as a self-contained SVG: the bands of :mod:`autopar.schedules.draw`, with a tooltip on each box."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from autopar.schedules.draw import COLOURS, WORDS, Bands, Piece, fold, shades_of, span_text
from autopar.schedules.instructions import Kind
from autopar.schedules.timing import Event, Timeline

COLUMNS = 150
COLUMN = 7  # pixels; a letter of 11 px monospace takes 6.6, so that labels fit their boxes
FONT = 11
ROW, GAP = 20, 3  # height of a row, and the space between two
BAND_GAP = 16
MARGIN = 10
HEAD = 34  # title
SWATCH = 14


def svg(timeline: Timeline, title: str, columns: int = COLUMNS) -> str:
    """The picture, folded to ``columns`` columns, with ``title`` above it and a legend of colours below.

    Raises ValueError for an empty timeline.
    """
    if not any(timeline.ranks):
        raise ValueError("there is nothing to draw: no rank computes anything")
    bands = fold(timeline, columns)
    left = MARGIN + COLUMN * (len(f"rank {len(timeline.ranks) - 1}") + 1)
    legend = _legend(timeline)
    inner = max(max(bands.lengths) * COLUMN, (max(len(title), sum(len(w) + 4 for _, w in legend)) * COLUMN) - left)
    several = len(bands.rows) > 1
    band_height = len(timeline.ranks) * (ROW + GAP) + BAND_GAP * several
    height = HEAD + band_height * len(bands.rows) + ROW + 2 * MARGIN
    width = left + inner + MARGIN
    body = [
        f'<text x="{MARGIN}" y="{MARGIN + FONT}" font-weight="bold">{escape(title)}</text>',
        *_bands(timeline, bands, left, band_height, several),
        *_swatches(legend, height - MARGIN - SWATCH),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{FONT}" fill="#222">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *body, "</svg>"]) + "\n"


def _bands(timeline: Timeline, bands: Bands, left: int, band_height: int, several: bool) -> Iterator[str]:
    shades = shades_of(timeline)
    for number, band in enumerate(bands.rows):
        top = HEAD + number * band_height
        if several:
            yield f'<text x="{left}" y="{top + FONT}" fill="#777">{span_text(timeline, bands, number)}</text>'
            top += BAND_GAP
        for rank, pieces in enumerate(band):
            y = top + rank * (ROW + GAP)
            yield f'<text x="{MARGIN}" y="{y + ROW - 6}">rank {rank}</text>'
            idle = bands.lengths[number] * COLUMN
            yield f'<rect x="{left}" y="{y}" width="{idle}" height="{ROW}" fill="#eee"/>'
            for piece in pieces:
                yield _box(piece, left, y, shades[piece.event.kind, piece.event.stage], timeline.measured)


def _box(piece: Piece, left: int, y: int, colour: str, measured: bool) -> str:
    x, width = left + piece.start * COLUMN, (piece.stop - piece.start) * COLUMN
    rect = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{ROW}" fill="{colour}" stroke="#fff">'
        f"<title>{_tip(piece.event, measured)}</title></rect>"
    )
    if not piece.label:
        return rect
    return f'{rect}<text x="{x + width / 2:g}" y="{y + ROW - 6}" text-anchor="middle">{piece.label}</text>'


def _tip(event: Event, measured: bool) -> str:
    what = f"{event.kind}{event.stage}.{event.microbatch} on rank {event.rank}"
    if measured:
        return f"{what}: {event.start_s * 1e3:.3f} .. {event.end_s * 1e3:.3f} ms"
    return f"{what}: {event.start_s:g} .. {event.end_s:g}"


def _legend(timeline: Timeline) -> list[tuple[str, str]]:
    """Each colour with its words."""
    present = {event.kind for own in timeline.ranks for event in own}
    kinds = [(COLOURS[kind][0], f"{kind} {WORDS[kind]}") for kind in Kind if kind in present]
    return [*kinds, ("#eee", "idle")]


def _swatches(legend: list[tuple[str, str]], y: int) -> Iterator[str]:
    x = MARGIN
    for colour, word in legend:
        yield f'<rect x="{x}" y="{y}" width="{SWATCH}" height="{SWATCH}" fill="{colour}"/>'
        yield f'<text x="{x + SWATCH + 4}" y="{y + FONT}">{word}</text>'
        x += SWATCH + (len(word) + 2) * COLUMN
